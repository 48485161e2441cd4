"""The additive kernels and their launchers under ThreadSanitizer and AddressSanitizer, compiled for the host."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sanitizers

CSRC = Path(__file__).resolve().parents[2] / "csrc"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(sanitizers.missing()), reason=str(sanitizers.missing())),
]

MOMENTS = """
int run(int activation, int groups) {  // critics of one problem, forward and backward
  const int n = 20, m = 70, h = 19, first_positive = 17;
  std::vector<float> a(groups * n * h), b(groups * m * h), w(groups * h);
  std::vector<float> j(groups), el(groups), g_j(groups), g_l(groups);
  for (size_t i = 0; i < a.size(); i++) a[i] = std::sin(1.7 * i);
  for (size_t i = 0; i < b.size(); i++) b[i] = std::cos(2.3 * i);
  for (size_t i = 0; i < w.size(); i++) w[i] = std::sin(0.9 * i + 1);
  for (int g = 0; g < groups; g++) g_j[g] = 0.5f + g, g_l[g] = -1.5f + g;
  std::vector<float> da_of_l(a.size()), db_of_l(b.size()), dw_of_l(w.size()), da(a.size()), db(b.size()), dw(w.size());
  ck::cuda::AdditiveMoments p = {};
  p.a = a.data(), p.b = b.data(), p.w = w.data(), p.n = n, p.m = m, p.h = h, p.first_positive = first_positive;
  p.activation = activation, p.slope = 0.2f, p.need_a = p.need_b = p.need_w = 1;
  p.j = j.data(), p.el = el.data(), p.groups = groups;
  p.da = da_of_l.data(), p.db = db_of_l.data(), p.dw = dw_of_l.data(), p.processors = 1, p.score_budget = 1 << 20;
  std::unique_ptr<char[]> workspace(new char[ck::cuda::additive_moments_workspace(p)]);
  p.workspace = workspace.get();
  ck::cuda::AdditiveMomentsBackward q = {};
  q.a = p.a, q.b = p.b, q.w = p.w, q.n = n, q.m = m, q.h = h, q.first_positive = first_positive;
  q.activation = activation, q.groups = groups, q.slope = p.slope, q.g_j = g_j.data(), q.g_l = g_l.data();
  q.da_of_l = p.da, q.db_of_l = p.db, q.dw_of_l = p.dw, q.da = da.data(), q.db = db.data(), q.dw = dw.data();
  std::unique_ptr<char[]> second(new char[ck::cuda::additive_moments_backward_workspace(q)]);
  q.workspace = second.get();
  if (ck::cuda::additive_moments(p) != 0 || ck::cuda::additive_moments_backward(q) != 0) return 1;
  for (int g = 0; g < groups; g++) {
    double sum = 0, first = 0, joint = 0;
    for (int i = 0; i < n; i++)
      for (int j = 0; j < m; j++) {
        double s = 0, first_unit = 0;
        for (int k = 0; k < h; k++) {
          const double t = a[(g * n + i) * h + k] + b[(g * m + j) * h + k];
          const double phi = activation == 4 ? t / (1 + std::exp(-t)) : t > 0 ? t : activation * 0.2 * t;
          s += w[g * h + k] * phi;
          if (k == 0) first_unit = phi;
        }
        if (j == first_positive + i) joint += first_unit / n;
        else sum += std::exp(s), first += std::exp(s) * first_unit;
      }
    const double off = std::abs(el[g] - std::log(sum / (n * m - n)));
    const double of_w = std::abs(dw[g * h] - (g_j[g] * joint + g_l[g] * first / sum));
    if (!(off < 1e-5) || !(of_w < 1e-5))
      return std::printf("activation %d, critic %d: errors of L %g, dw %g\\n", activation, g, off, of_w), 1;
  }
  return 0;
}
int main(int count, char** arguments) {
  without = count > 1 ? std::atoi(arguments[1]) : -1;
  return run(0, 2) || run(4, 1) || run(1, 1);  // two critics of ReLU, one of SiLU, one of leaky ReLU
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
LOOPS = ("scores.cuh", "gradients.cuh")  # headers of additive/moments; a loop of each ends in a barrier


def source(op: str, folder: Path) -> Path:
    """The op's file, in which activations that no driver above asks for are SiLU again: half as much to compile."""
    text, count = re.subn(
        r"^(CK_\w+\((?:gelu|gelu_tanh|elu|softplus|tanh), )\w+",
        r"\1Silu",
        (CSRC / op / "cuda.cu").read_text(),
        flags=re.M,
    )
    assert count >= 5
    (folder / "cuda.cu").write_text("inline int without = -1;  // which of LOOPS has no barrier\n#line 1\n" + text)
    return folder / "cuda.cu"


@pytest.mark.parametrize(
    ("op", "sanitizer"),
    [("additive/moments", "address"), ("additive/shifts", "thread"), ("additive/shifts", "address")],
)
def test_clean(op, sanitizer, tmp_path):
    report = sanitizers.check(source(op, tmp_path), CASES[op], sanitizer, include=[CSRC])
    assert report.clean, report.text[:4000]


def test_no_race_but_where_a_barrier_is_missing(tmp_path):
    """One program, that drops the barrier which its argument names."""
    (tmp_path / "additive/moments").mkdir(parents=True)
    for number, name in enumerate(LOOPS):
        text = (CSRC / "additive/moments" / name).read_text()
        loop_end = text.index("__syncthreads();", text.index("if (more) stage(buffer ^ 1);"))
        changed = f"{text[:loop_end]}if (without != {number}) {text[loop_end:]}"
        (tmp_path / "additive/moments" / name).write_text(changed)
    changed = source("additive/moments", tmp_path)
    program = sanitizers.build(tmp_path, changed, MOMENTS, "thread", include=[tmp_path, CSRC])
    report = sanitizers.run(program)
    assert report.clean, report.text[:4000]
    for number, name in enumerate(LOOPS):
        report = sanitizers.run(program, str(number))
        assert not report.clean and "data race" in report.text and f"moments/{name}:" in report.text, report.text[:4000]
