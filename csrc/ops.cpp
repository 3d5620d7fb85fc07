// Registers the raw CPU ops in namespace teleport_fast_cpp, through torch's stable ABI; the public ops are defined in Python.
#include "ops.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/blas.h"
#include "cpu/isa.h"

namespace teleport_fast {

// Switches the instruction set where `name` is not empty; answers with the one in use. For tests.
std::string isa(std::string name) {
  if (const char* problem = isa_environment_problem())
    STD_TORCH_CHECK(false, "TELEPORT_FAST_ISA=", std::getenv("TELEPORT_FAST_ISA"), ": ", problem);
  if (!name.empty()) {
    const char* problem = isa_problem(name.c_str());
    STD_TORCH_CHECK(!problem, "instruction set ", name, ": ", problem ? problem : "");
    use_isa(name.c_str());
  }
  return isa_name(current_isa());
}

}  // namespace teleport_fast

// Shapes and dtypes are checked in Python, with the user's names; the kernels check again what would be a memory error.
STABLE_TORCH_LIBRARY(teleport_fast_cpp, m) {
  m.def("isa(str name='') -> str");
  m.def("widest(str op, bool float64) -> int");  // in _ops_cuda.so
  m.def("gram_difference(Tensor[] plus, Tensor[] minus, int joints) -> (Tensor, Tensor)");
  m.def("group_action_(Tensor(a!)[] plus, Tensor(b!)[] minus, Tensor g, Tensor g_inverse_t, int joints) -> ()");
  m.def("covariance_(Tensor(a!) covariance, Tensor[] tensors, float decay, int joints) -> ()");
  m.def("orthogonal_iteration_(Tensor(a!)[] bases, Tensor[] covariances, Tensor(b!) turns) -> ()");
  m.def("matrix_exp(Tensor M) -> Tensor");
  m.def("matrix_exp_pair(Tensor M) -> (Tensor, Tensor)");
  m.def("grad_norm_objective(Tensor[] plus, Tensor[] minus, Tensor g, int joints) -> Tensor");
  m.def("activation_action(Tensor Z, Tensor g, Tensor slope) -> Tensor");
  m.def("activation_action_tangent(Tensor Z, Tensor M, Tensor slope) -> Tensor");
  m.def("square_sums(Tensor[] tensors, int joints) -> (Tensor, Tensor)");
  m.def("diagonal_action_(Tensor(a!)[] tensors, Tensor factors, int[] which, float[] shifts, int joints) -> ()");
  m.def("permutation_action_(Tensor(a!)[] tensors, Tensor index, int joints) -> ()");
  m.def(
      "teleport_adamw_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first_moments, Tensor(c!)[] second_moments, "
      "Tensor factors, int[] which, float[] shifts, float step, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "int joints) -> ()");
  m.def(
      "rotate_step_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first_moments, Tensor(c!)[] second_moments, "
      "Tensor[] left, Tensor[] right, int base, float step, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "bool nesterov) -> ()");
  m.def(
      "data_dependent_steps_(Tensor(a!) Z0, Tensor(b!)[] tail, Tensor gram, Tensor target, Tensor(c!) lead, Tensor(d!)[] Ts, "
      "Tensor(e!) outputs, Tensor(f!) trace, float slope, float scale, float cap, float gram_limit, float square_limit) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(teleport_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&teleport_fast::isa));
}

STABLE_TORCH_LIBRARY_IMPL(teleport_fast_cpp, CPU, m) {
  m.impl("gram_difference", TORCH_BOX(&teleport_fast::gram_difference));
  m.impl("group_action_", TORCH_BOX(&teleport_fast::group_action_));
  m.impl("covariance_", TORCH_BOX(&teleport_fast::covariance_));
  m.impl("matrix_exp", TORCH_BOX(&teleport_fast::matrix_exp));
  m.impl("matrix_exp_pair", TORCH_BOX(&teleport_fast::matrix_exp_pair));
  m.impl("grad_norm_objective", TORCH_BOX(&teleport_fast::grad_norm_objective));
  m.impl("activation_action", TORCH_BOX(&teleport_fast::activation_action));
  m.impl("activation_action_tangent", TORCH_BOX(&teleport_fast::activation_action_tangent));
  m.impl("square_sums", TORCH_BOX(&teleport_fast::square_sums));
  m.impl("diagonal_action_", TORCH_BOX(&teleport_fast::diagonal_action_));
  m.impl("permutation_action_", TORCH_BOX(&teleport_fast::permutation_action_));
  m.impl("teleport_adamw_", TORCH_BOX(&teleport_fast::teleport_adamw_));
  m.impl("rotate_step_", TORCH_BOX(&teleport_fast::rotate_step_));
  // Without an implementation of cpp's the op's other ones are chosen.
  if (teleport_fast::blas_present()) {
    m.impl("data_dependent_steps_", TORCH_BOX(&teleport_fast::data_dependent_steps_));
    m.impl("orthogonal_iteration_", TORCH_BOX(&teleport_fast::orthogonal_iteration_));
  }
}
