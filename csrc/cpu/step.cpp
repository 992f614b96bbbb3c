// pgd_step_ on the CPU: from the gradient of the views to the new delta, row by row.
#include "cpu/rows.h"

namespace scc_fast {
namespace {

struct StepJob {
  const Frame& frame;
  const void* gradient;
  float* delta;
  float* weighted;  // or null
  float alpha, epsilon, weight;

  template <class Number>
  SCC_INLINE void rows(int64_t begin, int64_t end) const {
    const int64_t width = frame.width;
    const Pixels pixels(frame);
    GatherBuffers<Number> buffers(width);
    for (int64_t i = begin; i < end; ++i) {
      gather_row<Number>(frame, pixels, gradient, Row(i, frame.height), buffers);
      const float* SCC_RESTRICT ascent = buffers.sum.data();
      const float* SCC_RESTRICT x = pixels.x + i * width;
      float* SCC_RESTRICT step = delta + i * width;
      for (int64_t k = 0; k < width; ++k) {
        step[k] = projected_step(step[k], ascent[k], x[k], alpha, epsilon);
      }
      if (!weighted) continue;
      float* SCC_RESTRICT sum = weighted + i * width;
      for (int64_t k = 0; k < width; ++k) sum[k] = accumulate(sum[k], weight, step[k]);
    }
  }
};

SCC_DEFINE_RUN(StepJob)

void pgd_step_(Tensor delta,                    // [B, 3, H, W], written
               std::optional<Tensor> weighted,  // like delta, written
               const Tensor& gradient,          // [L * B, …]
               const Tensor& x, const Tensor& seeds, const std::vector<int64_t>& plan,
               const std::vector<double>& noise, double alpha, double epsilon, double weight,
               int64_t patch) {
  const char* op = "pgd_step_";
  const Frame frame = read_frame(op, x, delta, seeds, plan, noise, patch);
  const Tensor rows = read_gradient(op, gradient, frame);
  check(delta.is_contiguous(), op, "delta must be contiguous");
  check_not_negative(op, "alpha, epsilon and weight must be finite numbers >= 0",
                     {alpha, epsilon, weight});
  check(delta.numel() == 0 || delta.const_data_ptr() != x.const_data_ptr(), op,
        "delta must not be x");
  if (weighted) {
    check(weighted->scalar_type() == ScalarType::Float && weighted->is_cpu(), op,
          "weighted must be a float32 CPU tensor");
    check(weighted->dim() == 4 && weighted->sizes().equals(x.sizes()), op,
          "weighted must have the shape of x");
    check(weighted->is_contiguous(), op, "weighted must be contiguous");
    check(delta.numel() == 0 || weighted->const_data_ptr() != delta.const_data_ptr(), op,
          "weighted must not be delta");
  }
  const StepJob job{frame,
                    rows.const_data_ptr(),
                    static_cast<float*>(delta.mutable_data_ptr()),
                    weighted ? static_cast<float*>(weighted->mutable_data_ptr()) : nullptr,
                    static_cast<float>(alpha),
                    static_cast<float>(epsilon),
                    static_cast<float>(weight)};
  run(job, rows.scalar_type(), frame.rows(), frame.grain());
}

}  // namespace
}  // namespace scc_fast

STABLE_TORCH_LIBRARY_IMPL(scc_fast, CPU, m) {
  m.impl("pgd_step_", TORCH_BOX(&scc_fast::pgd_step_));
}
