#include "moments.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define RENORM_ISA avx512
#define RENORM_VECTOR_BYTES 64
#include "kernels.h"
#pragma GCC pop_options
#endif
