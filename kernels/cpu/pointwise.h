// Row by row: RMSNorm, rotation, gated activation, cross-entropy. Formulas stand in the csrc file of each op.
#pragma once

#include "cpu_kernels.h"
#include "vector.h"

namespace ferrotune {
namespace {

// Calls body(offset, lanes) for each vector of n elements; the last may have fewer lanes.
template <typename Body>
inline void each_vector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, load, store);
  if (i < n) {
    const int64_t left = n - i;
    body(
        i, [left](const float* p) { return load_some(p, left); },
        [left](float* p, V v) { store_some(p, v, left); });
  }
}

inline void rms_norm_forward(int64_t rows, int64_t c, const float* x, int64_t x_stride, const float* w, float eps,
                             float offset, float* y, float* rstd) {
  for (int64_t r = 0; r < rows; ++r, x += x_stride, y += c) {
    V squares{};
    each_vector(c, [&](int64_t i, auto get, auto) {
      const V v = get(x + i);
      squares += v * v;
    });
    rstd[r] = 1.0f / sqrtf(sum(squares) / static_cast<float>(c) + eps);
    const float scale = rstd[r];
    each_vector(c, [&](int64_t i, auto get, auto put) { put(y + i, get(x + i) * scale * (get(w + i) + offset)); });
  }
}

inline void rms_norm_backward(int64_t rows, int64_t c, const float* dy, const float* x, int64_t x_stride, const float* w,
                              const float* rstd, float offset, float* dx, float* dw) {
  for (int64_t r = 0; r < rows; ++r, dy += c, x += x_stride, dx += c) {
    const float scale = rstd[r];
    V products{};
    each_vector(c, [&](int64_t i, auto get, auto put) {
      const V xh = get(x + i) * scale, d = get(dy + i);
      products += d * (get(w + i) + offset) * xh;
      if (dw != nullptr) put(dw + i, get(dw + i) + d * xh);
    });
    const float mean = sum(products) / static_cast<float>(c);
    each_vector(c, [&](int64_t i, auto get, auto put) {
      put(dx + i, (get(dy + i) * (get(w + i) + offset) - get(x + i) * (scale * mean)) * scale);
    });
  }
}

template <typename T>
inline void rotate(int64_t half, const float* x, const float* cos, const float* sin, float sign, float* y) {
  constexpr int64_t kWidth = sizeof(T) / sizeof(float);
  for (int64_t i = 0; i < half; i += kWidth) {
    T x1, x2, c, s;
    memcpy(&x1, x + i, sizeof(T));
    memcpy(&x2, x + half + i, sizeof(T));
    memcpy(&c, cos + i, sizeof(T));
    memcpy(&s, sin + i, sizeof(T));
    s = s * sign;
    const T y1 = x1 * c - x2 * s, y2 = x2 * c + x1 * s;
    memcpy(y + i, &y1, sizeof(T));
    memcpy(y + half + i, &y2, sizeof(T));
  }
}

inline void rope(int64_t rows, int64_t heads, int64_t dim, int64_t half, const float* x, int64_t x_stride,
                 const float* cos, const float* sin, float sign, float* y, int64_t y_stride) {
  for (int64_t r = 0; r < rows; ++r, x += x_stride, y += y_stride, cos += half, sin += half) {
    for (int64_t h = 0; h < heads; ++h) {
      const float* from = x + h * dim;
      float* to = y + h * dim;
      if (half % kLanes == 0) {
        rotate<V>(half, from, cos, sin, sign, to);
      } else if (half % 4 == 0) {
        rotate<V4>(half, from, cos, sin, sign, to);
      } else {
        rotate<float>(half, from, cos, sin, sign, to);
      }
      for (int64_t i = 2 * half; i < dim; ++i) to[i] = from[i];
    }
  }
}

// act(g) and act'(g).
struct Activated {
  V value, slope;
};

inline Activated activated(V g, CpuActivation activation) {
  if (activation == CpuActivation::kSilu) {
    const V sigmoid = 1.0f / (1.0f + exp(-g));
    return {g * sigmoid, sigmoid * (1.0f + g * (1.0f - sigmoid))};
  }
  if (activation == CpuActivation::kGeluTanh) {
    constexpr float kRoot = 0.7978845608028654f, kCubic = 0.044715f;  // sqrt(2 / pi)
    const V t = tanh(kRoot * (g + kCubic * g * g * g));
    return {0.5f * g * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * g * (1.0f - t * t) * kRoot * (1.0f + 3 * kCubic * g * g)};
  }
  float lanes[kLanes];
  store(lanes, g);
  for (float& x : lanes) x = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
  const V normal = load(lanes), density = 0.3989422804014327f * exp(-0.5f * g * g);
  return {g * normal, normal + g * density};
}

inline void swiglu_forward(int64_t rows, int64_t f, const float* gate_up, CpuActivation activation, float* y) {
  for (int64_t r = 0; r < rows; ++r, gate_up += 2 * f, y += f) {
    each_vector(f, [&](int64_t i, auto get, auto put) {
      put(y + i, activated(get(gate_up + i), activation).value * get(gate_up + f + i));
    });
  }
}

inline void swiglu_backward(int64_t rows, int64_t f, const float* dy, const float* gate_up, CpuActivation activation,
                            float* dgate_up) {
  for (int64_t r = 0; r < rows; ++r, gate_up += 2 * f, dgate_up += 2 * f, dy += f) {
    each_vector(f, [&](int64_t i, auto get, auto put) {
      const V d = get(dy + i), up = get(gate_up + f + i);
      const Activated gate = activated(get(gate_up + i), activation);
      put(dgate_up + i, d * up * gate.slope);
      put(dgate_up + f + i, d * gate.value);
    });
  }
}

inline void cross_entropy(int64_t rows, int64_t v, float* z, const int64_t* labels, float softcap, float* losses) {
  for (int64_t r = 0; r < rows; ++r, z += v) {
    if (softcap > 0) {
      each_vector(v, [&](int64_t i, auto get, auto put) { put(z + i, tanh(get(z + i) * (1.0f / softcap)) * softcap); });
    }
    const int64_t whole = v / kLanes * kLanes;
    V highest = spread(-INFINITY);
    for (int64_t i = 0; i < whole; i += kLanes) highest = max(highest, load(z + i));
    float top = largest(highest);
    for (int64_t i = whole; i < v; ++i) top = z[i] > top ? z[i] : top;
    const float label = z[labels[r]];
    double total = 0;
    constexpr int64_t kRun = 64 * kLanes;  // long float sums lose digits
    for (int64_t start = 0; start < v; start += kRun) {
      V part{};
      each_vector(v - start < kRun ? v - start : kRun, [&](int64_t i, auto get, auto put) {
        const float* at = z + start + i;
        const V e = exp(get(at) - top);
        const int64_t left = v - start - i;
        if (softcap <= 0) put(z + start + i, e);
        if (left >= kLanes) {
          part += e;
        } else {
          for (int64_t lane = 0; lane < left; ++lane) total += e[lane];
        }
      });
      total += sum(part);
    }
    losses[r] = static_cast<float>(log(total) - (label - top));
    const float scale = static_cast<float>(1 / total);
    each_vector(v, [&](int64_t i, auto get, auto put) {
      if (softcap > 0) {
        const V value = get(z + i), share = value * (1.0f / softcap);
        put(z + i, exp(value - top) * scale * (1.0f - share * share));
      } else {
        put(z + i, get(z + i) * scale);
      }
    });
    if (softcap > 0) {
      // p - 1 first: with it, a slope rounded two ways would be what is left of a certain row.
      const float share = label / softcap;
      z[labels[r]] = (exp(spread(label - top))[0] * scale - 1) * (1 - share * share);
    } else {
      z[labels[r]] -= 1;
    }
  }
}

}  // namespace
}  // namespace ferrotune
