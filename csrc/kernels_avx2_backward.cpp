#define RENORM_PROBLEM Backward
#include "kernels_avx2.cpp"
