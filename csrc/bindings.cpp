// The one file that knows Python: addresses, sizes, strides, type codes in; nothing else.
// No torch header, no Python object below this line of the house. The GIL is released during every kernel.
// Each function keeps the name and the arguments of csrc/cpu/svf_cpu.h or csrc/cuda/svf_cuda.h: read them there.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"
#include "cpu/mix.h"
#include "cpu/svf_cpu.h"
#include "prepared.h"
#ifdef T2_WITH_CUDA
#include "cuda/mix.h"
#include "cuda/svf_cuda.h"
#endif

namespace py = pybind11;
using py::arg;
using Unlocked = py::call_guard<py::gil_scoped_release>;

namespace {

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> out;
  for (std::string word; stream >> word;) out.push_back(word);
  return out;
}

py::dict build_info() {
  py::dict info;
  info["version"] = T2_VERSION;
  info["compiler"] = T2_COMPILER;
  info["build_type"] = T2_BUILD_TYPE;
  info["cpu_isas"] = words(T2_CPU_ISAS);
#ifdef T2_WITH_CUDA
  info["cuda"] = true;
  info["cudart"] = t2::cuda::runtime_version();
#else
  info["cuda"] = false;
#endif
  info["nvcc"] = T2_NVCC_VERSION;
  info["cuda_archs"] = words(T2_CUDA_ARCHS);
  return info;
}

void bind_cpu(py::module_& m) {
  using namespace t2::cpu;
  m.def("isa_name", &isa_name, arg("isa"));
  m.def("isa_available", &isa_available);
  m.def("isa_code", &isa_code, arg("name"));
  m.def("thread_runtime", &thread_runtime);
  m.def("svf_forward", &svf_forward, Unlocked(), arg("x"), arg("x_stride"), arg("U"), arg("V"), arg("d"),
        arg("d_stride"), arg("slots"), arg("slot"), arg("base"), arg("bias"), arg("scale"), arg("y"), arg("h"),
        arg("T"), arg("n"), arg("r"), arg("m"), arg("x_dtype"), arg("w_dtype"), arg("n_threads"), arg("isa"));
  m.def("svf_group", &svf_group, Unlocked(), arg("x"), arg("x_stride"), arg("U"), arg("V"), arg("d"), arg("d_stride"),
        arg("slots"), arg("slot"), arg("base"), arg("bias"), arg("scale"), arg("y"), arg("T"), arg("n"), arg("r"),
        arg("m"), arg("x_dtype"), arg("w_dtype"), arg("n_threads"), arg("isa"));
  m.def("linear", &linear, Unlocked(), arg("x"), arg("x_stride"), arg("W"), arg("bias"), arg("y"), arg("T"), arg("n"),
        arg("m"), arg("x_dtype"), arg("w_dtype"), arg("n_threads"), arg("isa"));
  m.def("scale_rows", &scale_rows, Unlocked(), arg("h"), arg("h_stride"), arg("out"), arg("out_stride"), arg("d"),
        arg("d_stride"), arg("slots"), arg("slot"), arg("base"), arg("scale"), arg("T"), arg("r"), arg("dtype"),
        arg("n_threads"), arg("isa"));
  m.def("backward_rows", &backward_rows, Unlocked(), arg("gu"), arg("gu_stride"), arg("h"), arg("h_stride"), arg("d"),
        arg("d_stride"), arg("slots"), arg("slot"), arg("base"), arg("scale"), arg("dd"), arg("T"), arg("r"),
        arg("dtype"), arg("n_threads"), arg("isa"));
  m.def("dequantise", &dequantise, Unlocked(), arg("q"), arg("q_dtype"), arg("scale"), arg("scale_axis"), arg("out"), arg("rows"),
        arg("cols"), arg("dtype"), arg("n_threads"), arg("isa"));
  m.def("mix", &mix, Unlocked(), arg("S"), arg("Z"), arg("z_stride"), arg("experts"), arg("z_dtype"), arg("alpha"),
        arg("indices"), arg("rows"), arg("offsets"), arg("layers"), arg("out"), arg("out_stride"), arg("slots"),
        arg("B"), arg("K"), arg("R"), arg("n_threads"));
  m.def("read_bandwidth", &read_bandwidth, Unlocked(), arg("data"), arg("bytes"), arg("n_threads"));
}

// f(x, y, T, slot, U, V, d, base, bias, n_threads) -> bool: False, and nothing run, where a tensor has moved. By
// CPython's own convention: pybind11 takes longer to read ten numbers than a small product does.
PyObject* call_prepared(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kNumbers = 10;
  if (count != kNumbers) {
    PyErr_Format(PyExc_TypeError, "a prepared product takes %zd numbers, got %zd", kNumbers, count);
    return nullptr;
  }
  unsigned long long number[kNumbers];
  for (Py_ssize_t i = 0; i < kNumbers; ++i) {
    number[i] = PyLong_AsUnsignedLongLong(args[i]);
    if (number[i] == static_cast<unsigned long long>(-1) && PyErr_Occurred()) return nullptr;
  }
  const auto& product = *static_cast<const t2::PreparedForward*>(PyCapsule_GetPointer(self, nullptr));
  if (product.moved({number[4], number[5], number[6], number[7], number[8]})) Py_RETURN_FALSE;
  try {
    py::gil_scoped_release unlocked;
    product.run(number[0], number[1], static_cast<std::int64_t>(number[2]), number[3], static_cast<int>(number[9]));
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_TRUE;
}

PyMethodDef kCallPrepared = {"prepared_forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_prepared)),
                             METH_FASTCALL, "f(x, y, T, slot, U, V, d, base, bias, n_threads) -> bool"};

py::object prepared_forward(t2::Address U, t2::Address V, t2::Address d, std::int64_t d_stride, std::int64_t slots,
                            t2::Address base, t2::Address bias, t2::Address scale, std::int64_t n, std::int64_t r,
                            std::int64_t m, int x_dtype, int w_dtype) {
  const auto* product = new t2::PreparedForward{U, V, d, base, bias, scale, d_stride, slots, n, r, m, x_dtype, w_dtype};
  const py::capsule owner(product, [](void* p) { delete static_cast<t2::PreparedForward*>(p); });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&kCallPrepared, owner.ptr()));
}

void bind_prepared(py::module_& m) {
  m.def("prepared_forward", &prepared_forward, arg("U"), arg("V"), arg("d"), arg("d_stride"), arg("slots"), arg("base"),
        arg("bias"), arg("scale"), arg("n"), arg("r"), arg("m"), arg("x_dtype"), arg("w_dtype"));
  m.def("same_bytes", &t2::same_bytes, arg("a"), arg("b"), arg("bytes"));
  m.def("environment", &t2::environment, arg("name"));
}

#ifdef T2_WITH_CUDA
void bind_cuda(py::module_& m) {
  using namespace t2::cuda;
  m.def("cuda_capture", &capture, arg("device"), arg("stream"));
  m.def("cuda_svf_decode", &svf_decode, Unlocked(), arg("x"), arg("x_stride"), arg("U"), arg("V"), arg("d"),
        arg("d_stride"), arg("slots"), arg("slot"), arg("base"), arg("bias"), arg("scale"), arg("y"), arg("h"),
        arg("work"), arg("barrier"), arg("T"), arg("n"), arg("r"), arg("m"), arg("x_dtype"), arg("w_dtype"),
        arg("form"), arg("tile"), arg("device"), arg("stream"));
  m.def("cuda_mix", &mix, Unlocked(), arg("S"), arg("Z"), arg("z_stride"), arg("experts"), arg("z_dtype"), arg("alpha"),
        arg("indices"), arg("rows"), arg("offsets"), arg("layers"), arg("out"), arg("out_stride"), arg("slots"),
        arg("B"), arg("K"), arg("R"), arg("device"), arg("stream"));
  m.def("cuda_svf_group", &svf_group, Unlocked(), arg("x"), arg("x_stride"), arg("U"), arg("V"), arg("d"),
        arg("d_stride"), arg("slots"), arg("slot"), arg("base"), arg("bias"), arg("scale"), arg("y"), arg("work"),
        arg("barrier"), arg("T"), arg("n"), arg("r"), arg("m"), arg("x_dtype"), arg("w_dtype"), arg("form"),
        arg("tile"), arg("device"), arg("stream"));
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU and CUDA kernels of t2kernels on raw addresses; use t2kernels.svf_linear instead.";
  m.def("build_info", &build_info);
  bind_cpu(m);
  bind_prepared(m);
#ifdef T2_WITH_CUDA
  bind_cuda(m);
#endif
}
