#define RENORM_PROBLEM Backward
#include "kernels_avx512.cpp"
