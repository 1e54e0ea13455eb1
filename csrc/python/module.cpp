// mhmatmul_ext._C: introspection. It knows no torch, so it can be asked what torch the operators' library was
// built for before that library is loaded.
#include "../introspection.h"

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

// The path of the operators' library, once Python has loaded it.
std::string library_path;

// A function of the loaded operators' library; never loads it.
template <class Function>
Function* find(const char* name) {
  void* const library = library_path.empty() ? nullptr : dlopen(library_path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (!library) throw std::runtime_error("the operators' library is not loaded: import mhmatmul_ext first");
  void* const symbol = dlsym(library, name);
  dlclose(library);
  if (!symbol) throw std::runtime_error(std::string("the operators' library lacks ") + name);
  return reinterpret_cast<Function*>(symbol);
}

py::dict build_config() {
  py::dict config;
  config["torch"] = MHMATMUL_TORCH_VERSION;
  config["cuda"] = MHMATMUL_CUDA_VERSION[0] ? py::object(py::str(MHMATMUL_CUDA_VERSION)) : py::none();
  config["cuda_architectures"] = MHMATMUL_CUDA_ARCHITECTURES;
  config["cpu_only_because"] = MHMATMUL_CPU_ONLY_BECAUSE;
  config["compiler"] = __VERSION__;
  return config;
}

std::string cpu_capability() { return find<decltype(mhmatmul_cpu_capability)>("mhmatmul_cpu_capability")(); }

void set_cpu_capability(const std::string& name) {
  if (!find<decltype(mhmatmul_set_cpu_capability)>("mhmatmul_set_cpu_capability")(name.c_str()))
    throw py::value_error("set_cpu_capability: name must be an instruction set of this machine, got '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Introspection of the mhmatmul operators' library.";
  m.def("build_config", build_config, "What the operators' library was built for and with.");
  m.def("bind", [](const std::string& path) { library_path = path; }, "Name the loaded operators' library.");
  m.def("cpu_capability", cpu_capability,
        "The instruction set of the CPU kernels: 'amx', 'avx512_bf16', 'avx512', 'avx2' or 'portable'.");
  m.def("set_cpu_capability", set_cpu_capability, "Force one that this machine has, for all threads.");
}
