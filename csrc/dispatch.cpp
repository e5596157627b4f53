#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace renorm {

// Compiled by kernels_*.cpp.
namespace baseline { template <class P> void run(const P& problem); }
namespace avx2 { template <class P> void run(const P& problem); }
namespace avx512 { template <class P> void run(const P& problem); }

namespace {

InstructionSet supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return InstructionSet::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

// RENORM_CPU=baseline or avx2 holds the kernels below what the machine supports, for tests and comparisons.
InstructionSet chosen() {
  const InstructionSet best = supported();
  const char* wanted = std::getenv("RENORM_CPU");
  if (!wanted) return best;
  if (std::strcmp(wanted, "baseline") == 0) return InstructionSet::baseline;
  if (std::strcmp(wanted, "avx2") == 0 && best == InstructionSet::avx512) return InstructionSet::avx2;
  return best;
}

template <class P>
void run_on_best(const P& problem) {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512) return avx512::run(problem);
  if (instruction_set() == InstructionSet::avx2) return avx2::run(problem);
#endif
  return baseline::run(problem);
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet set = chosen();
  return set;
}

template <class T>
void run(const Forward<T>& problem) { run_on_best(problem); }
template <class T>
void run(const Backward<T>& problem) { run_on_best(problem); }

#define RENORM_INSTANTIATE(T)              \
  template void run(const Forward<T>&);    \
  template void run(const Backward<T>&);
RENORM_FOR_ELEMENTS(RENORM_INSTANTIATE)

}  // namespace renorm
