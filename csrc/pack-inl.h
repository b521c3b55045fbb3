// Quantises floats to tiles of q8 and q4, with the same bits as the reference, kernels/packing.py. Lanes are
// the 16 rows of a tile, so every loop over them is one or two vectors. Included after the products.

using Lanes = float[kTileRows];
constexpr float kTiny = 1e-30F;  // what is smaller has no inverse in float32 and no scale in half precision
constexpr float kMaxScale = 65504.0F;  // the largest number in half precision
constexpr float kWidths[] = {0.8F, 0.88F, 0.96F};
constexpr int kNumScales =
    11;  // 1.04, 1.02, ... 0.84 times what maps the greatest width to the greatest size

inline float inverse(float x) { return std::fabs(x) < kTiny ? 0.0F : 1.0F / x; }
// NaN becomes the lower bound; the result of `pack` reports it.
inline float clamp(float x, float low, float high) { return x > low ? (x < high ? x : high) : low; }

// To half precision, ties to even, for |x| up to 65504.
inline uint16_t to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits < 0x38800000) {  // below the smallest normal number: a multiple of 2^-24
    const float steps = std::nearbyint(std::fabs(x) * 0x1p24F);
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(steps));
  }
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | static_cast<uint16_t>((rounded - 0x38000000) >> 13));
}

// sums = the pairwise sum of 32 rows of lanes.
inline void sum_group(Lanes* values, Lanes& sums) {
  for (int64_t n = kGroup / 2; n > 0; n /= 2) {
    for (int64_t c = 0; c < n; ++c) {
      for (int64_t r = 0; r < kTileRows; ++r) values[c][r] += values[c + n][r];
    }
  }
  std::memcpy(sums, values[0], sizeof(Lanes));
}

// The best width of each row's group for the integers q, and the cost of a deviation of 1 from it.
inline void fit(const Lanes* q, const Lanes* x, const float* spread, Lanes& width, Lanes& square) {
  alignas(64) Lanes along[kGroup], work[kGroup];
  for (int64_t c = 0; c < kGroup; ++c) {
    const float s = spread == nullptr ? 1.0F : spread[c];
    for (int64_t r = 0; r < kTileRows; ++r) {
      along[c][r] = q[c][r] * (x[c][r] * s);
      work[c][r] = q[c][r] * q[c][r] * s;
    }
  }
  sum_group(along, width);
  sum_group(work, square);
  for (int64_t r = 0; r < kTileRows; ++r) width[r] *= inverse(square[r]);
}

// The value of the largest size in each row, the first one where several have it.
inline void find_extremes(const Lanes* x, Lanes& extreme) {
  alignas(64) Lanes low, high;
  std::memcpy(low, x[0], sizeof(Lanes));
  std::memcpy(high, x[0], sizeof(Lanes));
  for (int64_t c = 1; c < kGroup; ++c) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      low[r] = x[c][r] < low[r] ? x[c][r] : low[r];
      high[r] = x[c][r] > high[r] ? x[c][r] : high[r];
    }
  }
  for (int64_t r = 0; r < kTileRows; ++r) {
    extreme[r] = high[r] > -low[r] ? high[r] : low[r];
    int64_t c = 0;
    if (high[r] == -low[r]) {
      while (std::fabs(x[c][r]) != high[r]) ++c;
      extreme[r] = x[c][r];
    }
  }
}

inline void pack_group_q8(const Lanes* x, const float* spread, uint8_t* codes, uint16_t* scales) {
  alignas(64) Lanes q[kGroup], extreme, width, square;
  find_extremes(x, extreme);
  for (int64_t r = 0; r < kTileRows; ++r) extreme[r] = inverse(extreme[r]) * -127.0F;
  for (int64_t c = 0; c < kGroup; ++c) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      q[c][r] = clamp(std::nearbyint(x[c][r] * extreme[r]), -127.0F, 127.0F);
    }
  }
  fit(q, x, spread, width, square);
  for (int64_t r = 0; r < kTileRows; ++r) {
    scales[r] = to_half(clamp(width[r], -kMaxScale, kMaxScale));
    width[r] = inverse(half_to_float(scales[r]));
  }
  for (int64_t v = 0; v < kGroup / 4; ++v) {
    uint32_t words[kTileRows] = {};
    for (int64_t j = 0; j < 4; ++j) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        const float code = clamp(std::nearbyint(x[4 * v + j][r] * width[r]), -127.0F, 127.0F) + 128.0F;
        words[r] |= static_cast<uint32_t>(static_cast<int32_t>(code)) << (8 * j);
      }
    }
    std::memcpy(codes + 64 * v, words, sizeof(words));
  }
}

// The result of a group's search for each row.
struct Fit {
  alignas(64) Lanes width, zero, square;
};

// x / width rounded to the nearest difference of a code and the zero.
inline float round_q4(float x, float inverse_width, float zero) {
  return clamp(std::nearbyint(x * inverse_width), -zero, 15.0F - zero);
}
inline float most_of(float zero) {  // the greatest size: products with all codes stay within a signed byte
  const float reach = zero > 15.0F - zero ? zero : 15.0F - zero;
  const float size = std::floor(127.0F / reach);
  return size < 15.0F ? size : 15.0F;
}

inline void search_q4(const Lanes* x, const float* spread, Fit& best) {
  alignas(64) Lanes q[kGroup], low, high, middle, gain, zero, reach, width, square, inverse_width;
  for (int64_t r = 0; r < kTileRows; ++r) low[r] = 0, high[r] = 0, gain[r] = -1;
  for (int64_t c = 0; c < kGroup; ++c) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      low[r] = x[c][r] < low[r] ? x[c][r] : low[r];
      high[r] = x[c][r] > high[r] ? x[c][r] : high[r];
    }
  }
  for (int64_t r = 0; r < kTileRows; ++r) {
    low[r] = -low[r];
    middle[r] = clamp(15.0F * low[r] * inverse(low[r] + high[r]), 4.0F, 11.0F);
    best.width[r] = 0, best.zero[r] = 8, best.square[r] = 0;
  }
  for (const bool up : {false, true}) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      zero[r] = up ? std::ceil(middle[r]) : std::floor(middle[r]);
      const float below = low[r] / zero[r], above = high[r] / (15.0F - zero[r]);
      reach[r] = below > above ? below : above;
    }
    for (const float factor : kWidths) {
      for (int64_t r = 0; r < kTileRows; ++r) inverse_width[r] = inverse(reach[r] * factor);
      for (int64_t c = 0; c < kGroup; ++c) {
        for (int64_t r = 0; r < kTileRows; ++r) q[c][r] = round_q4(x[c][r], inverse_width[r], zero[r]);
      }
      fit(q, x, spread, width, square);
      for (int64_t r = 0; r < kTileRows; ++r) {
        const float found = width[r] * width[r] * square[r];
        const bool better = found > gain[r];
        gain[r] = better ? found : gain[r];
        best.width[r] = better ? width[r] : best.width[r];
        best.zero[r] = better ? zero[r] : best.zero[r];
        best.square[r] = better ? square[r] : best.square[r];
      }
    }
  }
}

// Half-precision scales whose multiples best match the widths of a span's groups.
inline void scale_span(const Fit* fits, int64_t count, uint16_t* scales, Lanes& unit) {
  alignas(64) Lanes top, least, cost, each, costs[kSpan];
  for (int64_t r = 0; r < kTileRows; ++r) top[r] = 0, cost[r] = INFINITY, unit[r] = 0;
  for (int64_t g = 0; g < count; ++g) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      const float wanted = fits[g].width[r] * inverse(most_of(fits[g].zero[r]));
      top[r] = wanted > top[r] ? wanted : top[r];
    }
  }
  for (int64_t r = 0; r < kTileRows; ++r) least[r] = top[r] > 0 ? 0x1p-24F : 0.0F;
  std::memset(costs, 0, sizeof(costs));
  for (int i = -2; i < kNumScales - 2; ++i) {
    const auto factor = static_cast<float>(1.0 - 0.02 * i);
    for (int64_t r = 0; r < kTileRows; ++r) {
      const float wanted = top[r] * factor;
      each[r] = half_to_float(to_half(wanted < kMaxScale ? wanted : kMaxScale));
      each[r] = each[r] > least[r] ? each[r] : least[r];
    }
    for (int64_t g = 0; g < count; ++g) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        const float nearest = std::nearbyint(fits[g].width[r] * inverse(each[r]));
        const float most = most_of(fits[g].zero[r]), size = nearest < most ? nearest : most;
        const float off = size * each[r] - fits[g].width[r];
        costs[g][r] = off * off * fits[g].square[r];
      }
    }
    for (int64_t r = 0; r < kTileRows; ++r) {
      float sums[kSpan];
      for (int64_t g = 0; g < kSpan; ++g) sums[g] = costs[g][r];
      for (int64_t n = kSpan / 2; n > 0; n /= 2) {
        for (int64_t g = 0; g < n; ++g) sums[g] += sums[g + n];
      }
      const bool better = sums[0] < cost[r];
      cost[r] = better ? sums[0] : cost[r];
      unit[r] = better ? each[r] : unit[r];
    }
  }
  for (int64_t r = 0; r < kTileRows; ++r) scales[r] = to_half(unit[r]);
}

// Codes and steps of a group; of the two sizes nearest the width, the one with less error.
inline void code_group_q4(const Lanes* x, const float* spread, const Fit& found, const Lanes& unit,
                          uint8_t* codes, uint8_t* steps) {
  alignas(64) Lanes work[kGroup], best, cost, sums, size, width, inverse_width, zero;
  for (int64_t r = 0; r < kTileRows; ++r) best[r] = 0, cost[r] = INFINITY;
  for (int more = 0; more < 2; ++more) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      const float wanted = std::floor(found.width[r] * inverse(unit[r])) + static_cast<float>(more);
      const float most = most_of(found.zero[r]);
      size[r] = wanted < most ? wanted : most;
      width[r] = size[r] * unit[r];
      inverse_width[r] = inverse(width[r]);
    }
    for (int64_t c = 0; c < kGroup; ++c) {
      const float s = spread == nullptr ? 1.0F : spread[c];
      for (int64_t r = 0; r < kTileRows; ++r) {
        const float off = round_q4(x[c][r], inverse_width[r], found.zero[r]) * width[r] - x[c][r];
        work[c][r] = off * off * s;
      }
    }
    sum_group(work, sums);
    for (int64_t r = 0; r < kTileRows; ++r) {
      const bool better = sums[r] < cost[r];
      cost[r] = better ? sums[r] : cost[r];
      best[r] = better ? size[r] : best[r];
    }
  }
  for (int64_t r = 0; r < kTileRows; ++r) {
    zero[r] = best[r] > 0 ? found.zero[r] : 8.0F;
    inverse_width[r] = inverse(best[r] * unit[r]);
    steps[r] = static_cast<uint8_t>(best[r] + 16.0F * zero[r]);
  }
  for (int64_t v = 0; v < 4; ++v) {
    uint32_t words[kTileRows] = {};
    for (int64_t j = 0; j < 4; ++j) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        const float low = round_q4(x[4 * v + j][r], inverse_width[r], zero[r]) + zero[r];
        const float high = round_q4(x[16 + 4 * v + j][r], inverse_width[r], zero[r]) + zero[r];
        words[r] |= static_cast<uint32_t>(static_cast<int32_t>(low + 16.0F * high)) << (8 * j);
      }
    }
    std::memcpy(codes + 64 * v, words, sizeof(words));
  }
}

// The source of floats: rows of float32 or bf16.
struct FloatRows {
  const float* f = nullptr;
  const uint16_t* h = nullptr;
  int64_t rows = 0, cols = 0;
};

// |x| as bits, which compare as integers; NaN is the largest.
inline uint32_t size_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits & 0x7fffffff;
}

// Group `g` of a tile with one lane per row, padded with zeros. Raises `most` to the largest size_bits.
inline void load_group(const FloatRows& from, int64_t tile, int64_t g, Lanes* x, uint32_t& most) {
  const int64_t first = tile * kTileRows, left = from.cols - g * kGroup, below = from.rows - first;
  const int64_t cols = left < kGroup ? left : kGroup, rows = below < kTileRows ? below : kTileRows;
  if (cols < kGroup || rows < kTileRows) std::memset(x, 0, kGroup * sizeof(Lanes));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (first + r) * from.cols + g * kGroup;
    if (from.f != nullptr) {
      for (int64_t c = 0; c < cols; ++c) x[c][r] = from.f[at + c];
    } else {
      for (int64_t c = 0; c < cols; ++c) x[c][r] = from_bf16(from.h[at + c]);
    }
  }
  for (int64_t c = 0; c < kGroup; ++c) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      const uint32_t bits = size_bits(x[c][r]);
      most = bits > most ? bits : most;
    }
  }
}

inline uint32_t pack_tile_q8(const FloatRows& from, int64_t tile, const float* spread, uint8_t* out) {
  const int64_t n = groups(from.cols);
  alignas(64) Lanes x[kGroup];
  uint8_t* scales = out + n * code_bytes(Format::q8);
  uint32_t most = 0;
  for (int64_t g = 0; g < n; ++g) {
    load_group(from, tile, g, x, most);
    pack_group_q8(x, spread == nullptr ? nullptr : spread + g * kGroup, out + g * code_bytes(Format::q8),
                  reinterpret_cast<uint16_t*>(scales) + g * kTileRows);
  }
  return most;
}

inline uint32_t pack_tile_q4(const FloatRows& from, int64_t tile, const float* spread, uint8_t* out) {
  const int64_t n = groups(from.cols);
  alignas(64) Lanes x[kSpan][kGroup], unit;
  Fit fits[kSpan];
  uint8_t* steps = out + n * code_bytes(Format::q4);
  uint8_t* scales = steps + n * kTileRows;
  uint32_t most = 0;
  for (int64_t first = 0; first < n; first += kSpan) {
    const int64_t count = n - first < kSpan ? n - first : kSpan;
    const float* weights = spread == nullptr ? nullptr : spread + first * kGroup;
    for (int64_t g = 0; g < count; ++g) {
      load_group(from, tile, first + g, x[g], most);
      search_q4(x[g], weights == nullptr ? nullptr : weights + g * kGroup, fits[g]);
    }
    scale_span(fits, count, reinterpret_cast<uint16_t*>(scales) + first / kSpan * kTileRows, unit);
    for (int64_t g = 0; g < count; ++g) {
      code_group_q4(x[g], weights == nullptr ? nullptr : weights + g * kGroup, fits[g], unit,
                    out + (first + g) * code_bytes(Format::q4), steps + (first + g) * kTileRows);
    }
  }
  const int64_t used = scales + spans(from.cols) * 2 * kTileRows - out;
  std::memset(out + used, 0, static_cast<size_t>(tile_bytes(Format::q4, from.cols) - used));
  return most;
}

inline uint32_t pack_tile_bf16(const FloatRows& from, int64_t tile, uint8_t* out) {
  auto* to = reinterpret_cast<uint16_t*>(out);
  std::memset(out, 0, static_cast<size_t>(tile_bytes(Format::bf16, from.cols)));
  uint32_t most = 0;
  for (int64_t r = 0; r < kTileRows && tile * kTileRows + r < from.rows; ++r) {
    const int64_t at = (tile * kTileRows + r) * from.cols;
    for (int64_t c = 0; c < from.cols; ++c) {
      const uint16_t half = from.f != nullptr ? to_bf16(from.f[at + c]) : from.h[at + c];
      const uint32_t bits = from.f != nullptr ? size_bits(from.f[at + c]) : size_bits(from_bf16(half));
      most = bits > most ? bits : most;
      to[c / 2 * 2 * kTileRows + 2 * r + c % 2] = half;
    }
  }
  return most;
}

inline float pack(Format format, const float* f, const uint16_t* h, int64_t rows, int64_t cols,
                  const float* spread, uint8_t* out) {
  const FloatRows from{f, h, rows, cols};
  const int64_t tiles = num_tiles(rows), bytes = tile_bytes(format, cols);
  arena().reset();
  uint32_t* most = take<uint32_t>(num_threads());
  for (int i = 0; i < num_threads(); ++i) most[i] = 0;
  const int64_t grain = 1 + (1 << 14) / (cols * kTileRows);
  parallel(tiles, grain, [=](int64_t begin, int64_t end, int thread) {
    for (int64_t t = begin; t < end; ++t) {
      uint8_t* to = out + t * bytes;
      const uint32_t found = format == Format::q4   ? pack_tile_q4(from, t, spread, to)
                             : format == Format::q8 ? pack_tile_q8(from, t, spread, to)
                                                    : pack_tile_bf16(from, t, to);
      most[thread] = found > most[thread] ? found : most[thread];
    }
  });
  uint32_t largest = 0;
  for (int i = 0; i < num_threads(); ++i) largest = most[i] > largest ? most[i] : largest;
  float result;
  std::memcpy(&result, &largest, sizeof(result));
  return result;
}
