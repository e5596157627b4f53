"""The Triton kernels, for tensors on a GPU. Importing this folder's modules, but for `support`, imports Triton."""
