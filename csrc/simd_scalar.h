// Vectors of one float, which define every operation. Included inside a target's anonymous namespace. max and
// min return the second operand if one is NaN, as the instructions do.

constexpr int64_t W = 1;
struct V {
  float v;
};
inline V load(const float* p) { return {*p}; }
inline V load(const float* p, int64_t) { return {*p}; }
inline void store(float* p, V a) { *p = a.v; }
inline void store(float* p, V a, int64_t) { *p = a.v; }
inline V set1(float a) { return {a}; }
inline V add(V a, V b) { return {a.v + b.v}; }
inline V sub(V a, V b) { return {a.v - b.v}; }
inline V mul(V a, V b) { return {a.v * b.v}; }
inline V div(V a, V b) { return {a.v / b.v}; }
inline V fma(V a, V b, V c) { return {std::fma(a.v, b.v, c.v)}; }  // a b + c
inline V max(V a, V b) { return {a.v > b.v ? a.v : b.v}; }
inline V min(V a, V b) { return {a.v < b.v ? a.v : b.v}; }
inline V round_even(V a) { return {std::nearbyint(a.v)}; }
inline V pow2i(V n) {
  return {n.v == n.v ? std::ldexp(1.0F, static_cast<int>(n.v)) : n.v};
}  // 2^n of whole n
inline bool any_greater(V a, V b) { return a.v > b.v; }  // in any lane; never where one is NaN
inline float reduce_add(V a) { return a.v; }
inline float reduce_max(V a) { return a.v; }
inline V load_bf16(const uint16_t* p) {
  const uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return {value};
}
