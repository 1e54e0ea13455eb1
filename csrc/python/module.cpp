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

std::string cpu_half_path() { return find<decltype(mhmatmul_cpu_half_path)>("mhmatmul_cpu_half_path")(); }

void set_cpu_half_path(const std::string& name) {
  if (!find<decltype(mhmatmul_set_cpu_half_path)>("mhmatmul_set_cpu_half_path")(name.c_str()))
    throw py::value_error("set_cpu_half_path: name must be 'float32' or 'native', got '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Introspection of the mhmatmul operators' library.";
  m.def("build_config", build_config, "What the operators' library was built for and with.");
  m.def("bind", [](const std::string& path) { library_path = path; }, "Name the loaded operators' library.");
  m.def("cpu_half_path", cpu_half_path, "How half types are multiplied on CPU: 'float32' or 'native'.");
  m.def("set_cpu_half_path", set_cpu_half_path, "Force one of them, for all threads.");
}
