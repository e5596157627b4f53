// Stands in for the driver: every call succeeds and nothing runs. Triton's launchers go through it as they would on a
// device, so that the host's share of a launch can be measured, and a cache of compiled kernels filled, without one.
#include <stdint.h>

#include "cuda.h"

#define SUCCEEDS \
  { return CUDA_SUCCESS; }

#undef cuDevicePrimaryCtxRetain
#undef cuCtxSetLimit
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "stub";
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int index) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = 1024 * 256;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) SUCCEEDS
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)1;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) SUCCEEDS
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) SUCCEEDS
CUresult cuCtxSetLimit(CUlimit limit, size_t value) SUCCEEDS
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) SUCCEEDS
CUresult cuOccupancyMaxActiveClusters(int* number, CUfunction function, const CUlaunchConfig* config) {
  *number = 1;
  return CUDA_SUCCESS;
}
