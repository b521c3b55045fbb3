// Decoder layers and a norm as one op, so that memory is not idle between layers. Included by bindings.cpp
// after the single ops; does their checks for all layers before the first one runs.

struct Layer {
  std::variant<GatedDeltaNet, Attention> mixer;
  Ffn ffn;
};

using Cache = std::variant<const RecurrentCache*, const PagedCache*>;

// The C++ object in `object`, which is of one of two classes, by value or by pointer.
template <typename A, typename B, typename Result>
Result either(nb::handle object, const char* sentence) {
  if (nb::isinstance<A>(object)) return nb::cast<A>(object);
  if (nb::isinstance<B>(object)) return nb::cast<B>(object);
  refuse(sentence);
}

class Stack {
 public:
  Stack(const nb::sequence& mixers, const nb::sequence& ffns, nb::handle norm_object, float eps)
      : norm_(array<float>(norm_object, "norm", {kAny})), eps_(eps) {
    require(nb::len(mixers) == nb::len(ffns), "Every layer needs a mixer and a feed-forward part.");
    for (size_t i = 0; i < nb::len(mixers); ++i) {
      using Mixer = std::variant<GatedDeltaNet, Attention>;
      layers_.push_back({either<GatedDeltaNet, Attention, Mixer>(mixers[i],
                                                                 "A mixer is neither a GatedDeltaNet "
                                                                 "nor an Attention."),
                         nb::cast<Ffn>(nb::handle(ffns[i]))});
      require(layers_.back().ffn.layer.hidden == hidden() && mixer_hidden(layers_.back()) == hidden(),
              "All layers and the norm must have the same width.");
    }
  }

  // x [T, H] through all layers and normed, in place; the caches advance. `router_logits` is None or a list
  // with [T, E] for each layer that routes, None for the others.
  void run(const Batch& batch, const nb::sequence& caches, nb::handle x_object,
           nb::handle logits_object) const {
    const auto x = mutable_array<float>(x_object, "x", {batch.num_tokens(), hidden()});
    require(nb::len(caches) == layers_.size(), "There must be one cache for each layer.");
    std::vector<Cache> views;
    std::vector<Array<float, Mutable>> logits(layers_.size());
    for (size_t i = 0; i < layers_.size(); ++i) {
      views.push_back(checked_cache(layers_[i], batch, caches[i]));
      if (!logits_object.is_none()) logits[i] = router_logits(layers_[i].ffn, x.shape[0], logits_object[i]);
    }
    const Op op;
    for (size_t i = 0; i < layers_.size(); ++i) {
      run_mixer(layers_[i], batch, views[i], x.data);
      godwit::kernels().ffn(layers_[i].ffn.layer, x.shape[0], x.data, logits[i].data);
    }
    godwit::kernels().rms_norm(x.data, norm_.data, x.shape[0], hidden(), eps_, x.data);
  }

 private:
  int64_t hidden() const { return norm_.shape[0]; }

  static int64_t mixer_hidden(const Layer& layer) {
    return std::visit([](const auto& mixer) { return mixer.layer.hidden; }, layer.mixer);
  }

  static Cache checked_cache(const Layer& layer, const Batch& batch, nb::handle object) {
    const auto cache = either<const RecurrentCache*, const PagedCache*, Cache>(
        object, "A cache is neither a RecurrentCache nor a PagedCache.");
    if (const auto* mixer = std::get_if<GatedDeltaNet>(&layer.mixer)) {
      require(cache.index() == 0, "A delta layer needs a recurrent cache.");
      mixer->check(batch, *std::get<0>(cache));
    } else {
      require(cache.index() == 1, "An attention layer needs a paged cache.");
      std::get<Attention>(layer.mixer).check(batch, *std::get<1>(cache));
    }
    return cache;
  }

  static void run_mixer(const Layer& layer, const Batch& batch, const Cache& cache, float* x) {
    if (const auto* mixer = std::get_if<GatedDeltaNet>(&layer.mixer)) {
      godwit::kernels().gated_delta_net(mixer->layer, batch.view(), std::get<0>(cache)->view(), x);
    } else {
      const PagedCache& paged = *std::get<1>(cache);
      godwit::kernels().attention(std::get<Attention>(layer.mixer).layer, batch.view(),
                                  {paged.k.data, paged.v.data}, x);
    }
  }

  std::vector<Layer> layers_;
  Array<float> norm_;
  float eps_;
};
