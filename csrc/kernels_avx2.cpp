#include "moments.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define RENORM_ISA avx2
#define RENORM_VECTOR_BYTES 32
#include "kernels.h"
#pragma GCC pop_options
#endif
