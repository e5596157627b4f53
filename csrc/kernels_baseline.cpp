#include "moments.h"

#define RENORM_ISA baseline
#define RENORM_VECTOR_BYTES 16
#include "kernels.h"
