// The Python module scc_fast._C: importing it loads this library, whose STABLE_TORCH_LIBRARY_IMPL
// blocks then register themselves. BUILT says for what it was compiled.
//
// No pybind11: the ops use torch's stable ABI and Python's limited API, so that one wheel serves
// every torch and Python from the oldest on. pybind11 does not support the limited API, and the ops
// are called through torch's dispatcher. It binds the C++ runtime, in a separate module.
#include <Python.h>

#ifndef SCC_FAST_BUILT
#error "SCC_FAST_BUILT is set by setup.py"
#endif

PyMODINIT_FUNC PyInit__C(void) {  // PyMODINIT_FUNC keeps it visible under -fvisibility=hidden
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddStringConstant(module, "BUILT", SCC_FAST_BUILT) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
