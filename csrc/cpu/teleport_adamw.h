// teleport_adamw_: the work items that its host side hands to the kernel of one instruction set.
#pragma once

#include "block.h"
#include "isa.h"
#include "storage.h"

namespace teleport_fast {

// One step's numbers. keep = 1 - lr * weight_decay, rate = lr / (1 - beta1^step), scale = 1 / sqrt(1 - beta2^step).
struct AdamwStep {
  double beta1, beta2, eps, keep, rate, scale;
};

// Operands: parameter, gradient (read only), first moment, second moment. Factors: one per row, float or double (float64
// storage); the second moment's factor is the gradient's squared.
struct AdamwItem {
  Block<4> block;
  Storage storage;
  const void *parameter_factors, *gradient_factors;
  double shift;
  AdamwStep step;
};

TELEPORT_FAST_KERNEL(adamw_item, (const AdamwItem& item))

}  // namespace teleport_fast
