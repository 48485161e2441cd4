"""The additive kernels and their launchers under ThreadSanitizer and AddressSanitizer, compiled for the host."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sanitizers

CSRC = Path(__file__).resolve().parents[2] / "csrc"
pytestmark = [
    pytest.mark.slow,  # the host compiler takes half a minute for each sanitizer
    pytest.mark.skipif(bool(sanitizers.missing()), reason=str(sanitizers.missing())),
]

MOMENTS = """
int main() {
  const int n = 20, m = 70, h = 19, first_positive = 17;
  float j = 0, el = 0;
#ifdef EMU_THREADS
  const std::vector<int> activations = {0, 4};  // ReLU, SiLU
#else
  const std::vector<int> activations = {0, 1, 4};  // and leaky ReLU, whose steps are ReLU's
#endif
  for (int activation : activations) {
    std::vector<float> a(n * h), b(m * h), w(h), da(n * h), db(m * h), dw(h);
    for (size_t i = 0; i < a.size(); i++) a[i] = std::sin(1.7 * i);
    for (size_t i = 0; i < b.size(); i++) b[i] = std::cos(2.3 * i);
    for (size_t i = 0; i < w.size(); i++) w[i] = std::sin(0.9 * i + 1);
    ck::cuda::AdditiveMoments p = {};
    p.a = a.data(), p.b = b.data(), p.w = w.data(), p.n = n, p.m = m, p.h = h, p.first_positive = first_positive;
    p.activation = activation, p.slope = 0.2f, p.need_a = p.need_b = p.need_w = 1;
    p.j = &j, p.el = &el, p.groups = 1, p.da = da.data(), p.db = db.data(), p.dw = dw.data();
    p.processors = 1, p.score_budget = 1 << 20;
    std::unique_ptr<char[]> workspace(new char[ck::cuda::additive_moments_workspace(p)]);
    p.workspace = workspace.get();
    if (ck::cuda::additive_moments(p) != 0) return 1;
    double sum = 0, weights = 0, expected = 0;
    for (int i = 0; i < n; i++)
      for (int j = 0; j < m; j++) {
        if (j == first_positive + i) continue;
        double s = 0, first = 0;
        for (int k = 0; k < h; k++) {
          const double t = a[i * h + k] + b[j * h + k];
          const double phi = activation == 4 ? t / (1 + std::exp(-t)) : t > 0 ? t : activation * 0.2 * t;
          s += w[k] * phi;
          if (k == 0) first = phi;
        }
        sum += std::exp(s), expected += std::exp(s) * first;
      }
    weights = std::abs(dw[0] - expected / sum);
    if (!(std::abs(el - std::log(sum / (n * m - n))) < 1e-5) || !(weights < 1e-5)) {
      std::printf("activation %d: L %g, error of dw %g\\n", activation, el, weights);
      return 1;
    }
  }
}
"""
SHIFTS = """
int main() {
  const int n = 21, m = 25, h = 132, k = 5, first = 2;
  std::vector<float> a(n * h), b(m * h), w(h), scores(k * n), g(k * n), da(n * h), db(m * h), dw(h);
  for (size_t i = 0; i < a.size(); i++) a[i] = std::sin(1.7 * i);
  for (size_t i = 0; i < b.size(); i++) b[i] = std::cos(2.3 * i);
  for (size_t i = 0; i < w.size(); i++) w[i] = std::sin(0.9 * i + 1);
  for (size_t i = 0; i < g.size(); i++) g[i] = std::sin(3.1 * i);
  ck::cuda::AdditiveShifts p = {};
  p.a = a.data(), p.b = b.data(), p.w = w.data(), p.n = n, p.m = m, p.h = h, p.first = first, p.k = k;
  p.need_a = p.need_b = p.need_w = 1, p.scores = scores.data(), p.g = g.data();
  p.da = da.data(), p.db = db.data(), p.dw = dw.data();
  std::unique_ptr<char[]> workspace(new char[ck::cuda::additive_shifts_backward_workspace(p)]);
  p.workspace = workspace.get();
  if (ck::cuda::additive_shifts_forward(p) || ck::cuda::additive_shifts_backward(p)) return 1;
  double error = 0;
  for (int r = 0; r < k; r++)
    for (int i = 0; i < n; i++) {
      double s = 0;
      for (int u = 0; u < h; u++) s += w[u] * std::max(0.0f, a[i * h + u] + b[(i + first + r) % m * h + u]);
      error = std::max(error, std::abs(s - scores[r * n + i]));
    }
  if (!(error < 1e-4)) return std::printf("error %g\\n", error), 1;
}
"""
CASES = {"additive/moments": MOMENTS, "additive/shifts": SHIFTS}


def source(op, folder):
    """The op's file, in which activations that no driver above asks for are SiLU again: half as much to compile."""
    text, count = re.subn(
        r"^(CK_\w+\((?:gelu|gelu_tanh|elu|softplus|tanh), )\w+",
        r"\1Silu",
        (CSRC / op / "cuda.cu").read_text(),
        flags=re.M,
    )
    assert count >= 5
    (folder / "cuda.cu").write_text(text)
    return folder / "cuda.cu"


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("op", list(CASES))
def test_clean(op, sanitizer, tmp_path):
    report = sanitizers.check(source(op, tmp_path), CASES[op], sanitizer, include=[CSRC])
    assert report.clean, report.text[:4000]


@pytest.mark.parametrize("header", ["scores.cuh", "gradients.cuh"])
def test_a_missing_barrier_is_reported(header, tmp_path):
    text = (CSRC / "additive/moments" / header).read_text()
    loop_end = text.index("__syncthreads();", text.index("if (more) stage(buffer ^ 1);"))
    (tmp_path / "additive/moments").mkdir(parents=True)
    (tmp_path / "additive/moments" / header).write_text(text[:loop_end] + text[loop_end + len("__syncthreads();") :])
    # h of 2 stages, so that the loop's barrier matters
    changed = source("additive/moments", tmp_path)
    report = sanitizers.check(changed, MOMENTS, "thread", include=[tmp_path, CSRC])
    assert not report.clean
