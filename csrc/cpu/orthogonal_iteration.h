// orthogonal_iteration_: the panels that its host side hands to the kernel of one instruction set.
#pragma once

#include "isa.h"

namespace teleport_fast {

// Rows of a panel: products of this depth run at two thirds of the BLAS' best rate, and the panel stays in a first-level cache.
constexpr int64_t kPanelRows = 32;
// Zeros that follow every row of the matrix and of the reflectors: a vector may begin at the row's last entry.
constexpr int64_t kRowPadding = 16;

// Reflectors H_i = I - tau_i v_iᵀ v_i that bring `rows` consecutive rows x_i to the left: X H_0 H_1 ... is lower triangular.
// H_0 H_1 ... = I - Vᵀ T V, with V's rows v_i and T upper triangular, (rows, kPanelRows). signs: -1 where L's diagonal is negative.
// x and v point at the panel's diagonal, `length` entries before the end of a row; v's panel is zero.
struct ReflectorPanel {
  void *x, *v, *t, *signs;
  int64_t step, rows, length;
};

TELEPORT_FAST_KERNEL(reflect_panel, (const ReflectorPanel& panel, bool is_double))

}  // namespace teleport_fast
