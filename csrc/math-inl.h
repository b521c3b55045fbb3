// Elementary functions on vectors, with the same bits for every width. Included after a simd_*.h.

// exp to 2 ulp, with x clamped to [-87, 88]; NaN stays NaN. Reduction and polynomial of Cephes.
inline V exp(V x) {
  const V clamped = max(set1(-87.0F), min(set1(88.0F), x));
  const V n = round_even(mul(clamped, set1(1.44269504088896341F)));
  V r = fma(n, set1(-0.693359375F), clamped);
  r = fma(n, set1(2.12194440e-4F), r);
  V p = set1(1.9875691500e-4F);
  p = fma(p, r, set1(1.3981999507e-3F));
  p = fma(p, r, set1(8.3334519073e-3F));
  p = fma(p, r, set1(4.1665795894e-2F));
  p = fma(p, r, set1(1.6666665459e-1F));
  p = fma(p, r, set1(5.0000001201e-1F));
  p = add(fma(mul(r, r), p, r), set1(1.0F));
  return mul(p, pow2i(n));
}

inline V sigmoid(V x) { return div(set1(1.0F), add(set1(1.0F), exp(sub(set1(0.0F), x)))); }
inline V silu(V x) { return mul(x, sigmoid(x)); }

inline float exp1(float x) {
  alignas(64) float out[W];
  store(out, exp(set1(x)));
  return out[0];
}

// Sum over i < n of a[i] b[i] in the order of a vector of W lanes; the same at every call site.
inline float dot(const float* a, const float* b, int64_t n) {
  V sum = set1(0.0F);
  int64_t i = 0;
  for (; i + W <= n; i += W) sum = fma(load(a + i), load(b + i), sum);
  if (i < n) sum = fma(load(a + i, n - i), load(b + i, n - i), sum);
  return reduce_add(sum);
}

// out [n] = x / rms(x) * factor.
inline void norm_row(const float* x, const float* factor, int64_t n, float eps, float* out) {
  const V scale = set1(1.0F / std::sqrt(dot(x, x, n) / static_cast<float>(n) + eps));
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, mul(mul(load(x + i), scale), load(factor + i)));
  if (i < n) store(out + i, mul(mul(load(x + i, n - i), scale), load(factor + i, n - i)), n - i);
}

inline uint16_t to_bf16(float value) {  // to nearest, halves to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>((bits >> 16) | 0x40U);
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}
inline float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
