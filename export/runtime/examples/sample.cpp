// Draws the base stage of a bundle in C++: tokens in, a picture out. docs/bundle.md is the contract.
//
//   g++ -std=c++17 -O2 sample.cpp -I ORT/include -L ORT/lib -lonnxruntime -o sample
//   ./sample BUNDLE SEED TOKEN... > picture.ppm
//
// TOKENs are what tokenizer.json makes of the prompt, SEED is a 32-bit number: noise is that of
// torch.Generator().manual_seed(SEED), the solver DDIM, steps and guidance those of the bundle.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

using Floats = std::vector<float>;
using Shape = std::vector<int64_t>;

std::string read(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + " cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

// What follows `"key":`, as far as this example needs JSON; take a library for yours.
const char* after(const std::string& json, const std::string& key) {
  size_t place = json.find('"' + key + '"');
  if (place == std::string::npos) throw std::runtime_error("no " + key);
  return json.c_str() + json.find(':', place) + 1;
}
double number(const std::string& json, const std::string& key) { return atof(after(json, key)); }
std::string word(const std::string& json, const std::string& key) {
  std::string rest = strchr(after(json, key), '"') + 1;
  return rest.substr(0, rest.find('"'));
}
std::vector<double> numbers(const std::string& json, const std::string& key) {
  std::vector<double> found;
  int depth = 0;
  for (const char* c = after(json, key); *c; ++c) {
    depth += (*c == '[') - (*c == ']');
    if (*c == ']' && depth == 0) break;
    if (isdigit(*c) || *c == '-') {
      char* end;
      found.push_back(strtod(c, &end));
      c = end - 1;
    }
  }
  return found;
}

// torch.randn on the CPU, of a multiple of 16 numbers: groups of eight pairs, cosines then sines.
Floats normal(std::mt19937& words, size_t count) {
  Floats values(count);
  for (float& value : values) value = (words() & 0xFFFFFF) * 0x1p-24f;
  for (size_t i = 0; i < count; i += 16)
    for (size_t j = i; j < i + 8; ++j) {
      float radius = std::sqrt(-2 * std::log(1 - values[j])), angle = 2 * float(M_PI) * values[j + 8];
      values[j] = radius * std::cos(angle), values[j + 8] = radius * std::sin(angle);
    }
  return values;
}

// `dynamic` thresholding: the percentile of the absolute values, by linear interpolation.
float limit(const Floats& x_0, double percentile) {
  Floats sorted = x_0;
  for (float& value : sorted) value = std::abs(value);
  std::sort(sorted.begin(), sorted.end());
  double place = percentile * (sorted.size() - 1);
  size_t low = place, high = std::min(low + 1, sorted.size() - 1);
  return std::max(1.0, sorted[low] + (place - low) * (sorted[high] - sorted[low]));
}

int main(int argc, char** argv) try {
  if (argc < 4) throw std::runtime_error("usage: sample BUNDLE SEED TOKEN...");
  std::string folder = argv[1], facts = read(folder + "/bundle.json");
  std::string base = facts.substr(facts.find("\"stages\""));  // its first entry
  folder += "/";
  std::string unet = folder + word(base, "folder") + "/", null = read(unet + "null_text.json");
  std::vector<double> abar = numbers(read(unet + "schedule.json"), "abar");
  std::vector<double> times = numbers(base, "times");

  Ort::Env env(ORT_LOGGING_LEVEL_ERROR);
  auto cpu = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto floats = [&](Floats& v, Shape s) {
    return Ort::Value::CreateTensor<float>(cpu, v.data(), v.size(), s.data(), s.size());
  };
  auto open = [&](const std::string& path) { return Ort::Session(env, path.c_str(), Ort::SessionOptions()); };
  auto run = [](Ort::Session& graph, std::vector<const char*> in, std::vector<Ort::Value> feed,
                std::vector<const char*> out) {
    return graph.Run(Ort::RunOptions(), in.data(), feed.data(), in.size(), out.data(), out.size());
  };
  auto copy = [](Ort::Value& v) {
    const float* data = v.GetTensorData<float>();
    return Floats(data, data + v.GetTensorTypeAndShapeInfo().GetElementCount());
  };

  // Tokens to features, and features, cut or filled, to what the denoiser takes as text.
  std::vector<int64_t> ids;
  for (int i = 3; i < argc; ++i) ids.push_back(atol(argv[i]));
  std::vector<int64_t> ones(ids.size(), 1);
  Shape of_ids = {1, int64_t(ids.size())};
  auto integers = [&](std::vector<int64_t>& v) {
    return Ort::Value::CreateTensor<int64_t>(cpu, v.data(), v.size(), of_ids.data(), 2);
  };
  std::vector<Ort::Value> feed;
  feed.push_back(integers(ids)), feed.push_back(integers(ones));
  Ort::Session encoder = open(folder + "text_encoder.onnx");
  auto features = run(encoder, {"input_ids", "attention_mask"}, std::move(feed), {"text_embeds"});
  int64_t length = number(base, "max_text_len"), width = number(facts, "embed_dim");
  Floats embeds = copy(features[0]);
  embeds.resize(length * width);
  std::vector<char> mask(length, 0);
  std::fill_n(mask.begin(), std::min<size_t>(length, ids.size()), 1);
  Shape of_mask = {1, length};
  feed.clear(), feed.push_back(floats(embeds, {1, length, width}));
  feed.push_back(Ort::Value::CreateTensor<bool>(cpu, (bool*)mask.data(), length, of_mask.data(), 2));
  Ort::Session conditioner = open(unet + "conditioner.onnx");
  auto text = run(conditioner, {"text_embeds", "text_mask"}, std::move(feed),
                  {"text_tokens", "text_hidden"});
  Shape of_tokens = text[0].GetTensorTypeAndShapeInfo().GetShape();
  Shape of_hidden = text[1].GetTensorTypeAndShapeInfo().GetShape();
  Floats tokens = copy(text[0]), hidden = copy(text[1]);
  auto doubles = numbers(null, "tokens");
  Floats null_tokens(doubles.begin(), doubles.end());
  doubles = numbers(null, "hidden");
  Floats null_hidden(doubles.begin(), doubles.end());

  int64_t side = number(base, "image_size");
  std::mt19937 words(strtoul(argv[2], nullptr, 10));
  Floats x_t = normal(words, 3 * side * side), x_0(x_t.size()), scale = {float(number(base, "cond_scale"))};
  std::string predicts = word(base, "pred_type"), thresholding = word(base, "thresholding");
  Ort::Session denoiser = open(unet + "denoiser.onnx");
  for (size_t i = 0; i < times.size(); ++i) {
    Floats t = {float(times[i])};
    feed.clear(), feed.push_back(floats(x_t, {1, 3, side, side})), feed.push_back(floats(t, {1}));
    feed.push_back(floats(tokens, of_tokens)), feed.push_back(floats(hidden, of_hidden));
    feed.push_back(floats(null_tokens, of_tokens)), feed.push_back(floats(null_hidden, of_hidden));
    feed.push_back(floats(scale, {1}));
    auto output = run(denoiser, {"x_t", "t", "text_tokens", "text_hidden", "null_tokens",
                                 "null_hidden", "cond_scale"}, std::move(feed), {"prediction"});
    Floats p = copy(output[0]);
    double alpha = std::sqrt(abar[times[i]]), sigma = std::sqrt(1 - abar[times[i]]);
    for (size_t j = 0; j < p.size(); ++j)
      x_0[j] = predicts == "x0" ? p[j] : predicts == "v" ? alpha * x_t[j] - sigma * p[j]
                                                         : (x_t[j] - sigma * p[j]) / alpha;
    if (thresholding != "none") {
      float s = thresholding == "clamp" ? 1 : limit(x_0, number(base, "percentile"));
      for (float& value : x_0) value = std::clamp(value, -s, s) / s;
    }
    if (i + 1 == times.size()) break;
    double lower = abar[times[i + 1]];  // DDIM
    for (size_t j = 0; j < p.size(); ++j)
      x_t[j] = std::sqrt(lower) * x_0[j] + std::sqrt(1 - lower) * (x_t[j] - alpha * x_0[j]) / sigma;
  }
  printf("P6 %ld %ld 255\n", long(side), long(side));
  for (int64_t i = 0; i < side * side; ++i)
    for (int c = 0; c < 3; ++c)
      putchar(std::lround((std::clamp(x_0[c * side * side + i], -1.f, 1.f) + 1) * 127.5f));
  return 0;
} catch (const std::exception& error) {
  fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
