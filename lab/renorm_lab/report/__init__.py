"""`renorm report`: run folders as one page, beside what the papers claim."""
