#define RENORM_PROBLEM Backward
#include "kernels_baseline.cpp"
