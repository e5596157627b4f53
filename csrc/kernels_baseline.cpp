#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC optimize("O1")  // for processors of before 2013 there, which are not worth the time to build better
#endif
#include "moments.h"

#define RENORM_ISA baseline
#define RENORM_VECTOR_BYTES 16
#include "kernels.h"
