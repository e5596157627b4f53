// The kernels for the best instruction set of the machine they run on.
#pragma once

#include "problem.h"

namespace renorm {

enum class InstructionSet { baseline, avx2, avx512 };

InstructionSet instruction_set();

template <class T>
void run(const Forward<T>& problem);
template <class T>
void run(const Backward<T>& problem);

}  // namespace renorm
