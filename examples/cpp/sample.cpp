// Images of a class-conditional model from an engine bundle, without Python: docs/engine-bundle.md describes the
// bundle, the noise file and the arithmetic, which is that of src/tqdit/sampling/chains.py operation by operation.

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

#include "files.hpp"

namespace fs = std::filesystem;
using Floats = std::vector<float>;

constexpr char usage[] =
    "tqdit_sample ENGINE NOISE OUTPUT.ppm [--classes C,C,...] [--guidance-scale S] [--batch N] [--threads N] "
    "[--states FILE]";
constexpr int manifest_version = 3, card_version = 3, noise_version = 1;
constexpr size_t most_lag = 3;
// Columns of a step's coefficients; most_lag + 1 weights of states and as many of predictions follow.
enum Column : size_t {
    input_scale,
    noise_weight,
    low,
    spread,
    state_weights,
    output_weights = state_weights + most_lag + 1,
    columns = output_weights + most_lag + 1
};

struct Options {
    fs::path engine, noise, output, states;
    std::vector<size_t> classes;
    std::optional<float> guidance_scale;
    size_t batch = 16;
    std::optional<size_t> threads;
};

// What the program needs of a manifest.
struct Bundle {
    fs::path entry, decoder;  // decoder: empty if the states are pictures
    std::string float_type, fingerprint;
    std::string state, time, label;  // ports
    std::vector<size_t> shape;       // of one state
    size_t predicted_channels, classes;
    std::optional<size_t> null_class;
    bool guided;
    float guidance_scale = 1;
    size_t guided_channels = 0;  // how many leading channels of the prediction guidance moves

    size_t channels() const { return shape[0]; }
    size_t elements() const { return product(shape); }
    size_t area() const { return elements() / channels(); }
    size_t rows_per_image() const { return guided ? 2 : 1; }
};

// A noise file: the schedule's table, and noise of so many images.
struct Chain {
    std::vector<double> timesteps;
    Floats coefficients, noise;
    float initial_scale;
    size_t images, lag = 0;

    size_t steps() const { return timesteps.size(); }
    const float* step(size_t step) const { return &coefficients[step * columns]; }
};

size_t whole_number(const std::string& name, const std::string& text) {
    size_t used = 0;
    long long number = -1;
    try {
        number = std::stoll(text, &used);
    } catch (const std::exception&) {
    }
    if (number < 0 || used != text.size()) throw Failure(name + " is '" + text + "'; expected a whole number.");
    return static_cast<size_t>(number);
}

Options read_options(int count, char** words) {
    std::vector<std::string> places;
    Options options;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        if (word.rfind("--", 0) != 0) {
            places.push_back(word);
            continue;
        }
        if (++i == count) throw Failure(word + " takes a value. Usage: " + usage);
        const std::string value = words[i];
        if (word == "--classes") {
            std::stringstream parts(value);
            for (std::string part; std::getline(parts, part, ',');) options.classes.push_back(whole_number(word, part));
        } else if (word == "--guidance-scale") {
            char* end = nullptr;
            const double scale = std::strtod(value.c_str(), &end);
            if (end == value.c_str() || *end != 0 || !(std::abs(scale) <= 1000))
                throw Failure(word + " is '" + value + "'; expected a number from -1000 to 1000.");
            options.guidance_scale = static_cast<float>(scale);
        } else if (word == "--batch" || word == "--threads") {
            const size_t number = whole_number(word, value);
            if (number < 1 || number > 1024) throw Failure(word + " is " + value + "; expected 1 to 1024.");
            (word == "--batch" ? options.batch : options.threads.emplace()) = number;
        } else if (word == "--states") {
            options.states = value;
        } else {
            throw Failure("unknown option " + word + ". Usage: " + usage);
        }
    }
    if (places.size() != 3) throw Failure(std::string("Usage: ") + usage);
    options.engine = places[0], options.noise = places[1], options.output = places[2];
    return options;
}

void check_version(const Json& record, const std::string& where, int expected, const std::string& remedy) {
    const double found = record["format_version"].number();
    if (found != expected) {
        std::ostringstream text;  // std::to_string(3.0) is 3.000000
        text << where << " has format " << found << ", this program reads format " << expected << ". " << remedy;
        throw Failure(text.str());
    }
}

// The path of a part, which is there in full. (Python compares its SHA-256 also.)
fs::path part(const fs::path& folder, const Json& files, const std::string& name) {
    const fs::path path = folder / name;
    std::error_code error;
    const auto size = fs::file_size(path, error);
    if (fs::path(name).filename() != name || error || size != files[name]["size_bytes"].size())
        throw Failure(path.string() + ": missing, truncated or altered. Build the engine again.");
    return path;
}

Bundle open_bundle(const fs::path& folder) {
    const fs::path file = folder / "manifest.json";
    if (!fs::is_regular_file(file))
        throw Failure(folder.string() + ": not an engine bundle (it has no manifest.json).");
    const Json manifest = Json::parse(read_file(file), file.string());
    const Json &card = manifest["card"], &files = manifest["files"];
    check_version(manifest, file.string(), manifest_version, "Build the engine again.");
    check_version(card, file.string() + ": the card", card_version, "Export the model again.");
    const std::string backend = manifest["backend"].text();
    if (backend != "openvino")
        throw Failure(folder.string() + ": built for " + backend +
                      ", this program runs openvino. Run tqdit-build --backend openvino.");
    if (card["graph"].text() != "denoiser") throw Failure(folder.string() + ": a step graph; expected a denoiser.");
    if (!card["rows"].is_null())
        throw Failure(folder.string() + ": takes a fixed number of rows; expected any number.");
    if (card.has("correction") && !card["correction"].is_null())
        throw Failure(folder.string() + ": its chains take back the network's errors. Calibrate without --correction.");

    Bundle bundle;
    for (const auto& name : files.names()) part(folder, files, name);
    bundle.entry = part(folder, files, manifest["entry"].text());
    if (!manifest["decoder"].is_null()) bundle.decoder = part(folder, files, manifest["decoder"].text());
    bundle.float_type = manifest["float_type"].text();
    bundle.fingerprint = card["fingerprint"].text();
    for (const auto& port : card["signature"]["ports"].items()) {
        const std::string kind = port["kind"].text();
        if (kind == "state") {
            bundle.state = port["name"].text();
            bundle.shape = port["shape"].shape();
        } else if (kind == "time") {
            bundle.time = port["name"].text();
        } else if (!bundle.label.empty() || port["dtype"].text() != "int64" || port["values"].is_null()) {
            throw Failure(folder.string() + ": takes '" + port["name"].text() + "'; expected a class alone.");
        } else {
            bundle.label = port["name"].text();
            if (!port["null"].is_null()) bundle.null_class = port["null"].size();
            bundle.classes = port["values"].size();
        }
    }
    if (bundle.label.empty() || bundle.shape.empty() || bundle.elements() == 0)
        throw Failure(folder.string() + ": expected a class-conditional model.");
    const bool grey_or_rgb = bundle.shape.size() == 3 && (bundle.shape[0] == 1 || bundle.shape[0] == 3);
    if (bundle.decoder.empty() && !(card["latents"].is_null() && grey_or_rgb))
        throw Failure(folder.string() +
                      ": its states are not pictures, and it has no decoder. Export it with --vae DIR.");
    bundle.predicted_channels = card["signature"]["output"].shape().at(0);
    if (bundle.predicted_channels < bundle.channels()) throw Failure(folder.string() + ": predicts too few channels.");
    const Json& guidance = card["guidance"];
    bundle.guided = !guidance.is_null();
    if (bundle.guided) {
        if (!bundle.null_class) throw Failure(folder.string() + ": guided without a class of unconditional rows.");
        bundle.guidance_scale = static_cast<float>(guidance["scale"].number());
        bundle.guided_channels = bundle.channels();
        if (!guidance["channels"].is_null())
            bundle.guided_channels = std::min(bundle.guided_channels, guidance["channels"].size());
    }
    return bundle;
}

Chain read_chain(const fs::path& path, const Bundle& bundle) {
    const Tensors file(path);
    const std::string where = path.string();
    if (!file.header().has("__metadata__") || !file.header()["__metadata__"].has("tqdit_noise"))
        throw Failure(where + ": not a noise file. Write one with tqdit-sample --save-noise.");
    const Json facts = Json::parse(file.header()["__metadata__"]["tqdit_noise"].text(), where);
    check_version(facts, where, noise_version, "Write it again: tqdit-sample --save-noise.");

    Chain chain;
    chain.timesteps = file.read<double>("timesteps");
    chain.coefficients = file.read<float>("coefficients");
    chain.noise = file.read<float>("noise");
    chain.initial_scale = file.read<float>("initial_scale").at(0);
    auto shape = file.shape("noise");
    if (shape.size() != bundle.shape.size() + 2 ||
        !std::equal(bundle.shape.begin(), bundle.shape.end(), shape.begin() + 2))
        throw Failure(where + ": noise of another shape than the engine's states. Write it with this engine.");
    if (facts["fingerprint"].text() != bundle.fingerprint)
        throw Failure(where + ": written for another model. Write it with this engine.");
    chain.images = shape[1];
    if (chain.noise.empty() || chain.steps() == 0 || chain.coefficients.size() != chain.steps() * columns)
        throw Failure(where + ": its arrays do not belong together. Write it again.");
    bool learned = false;
    for (size_t step = 0; step < chain.steps(); ++step) {
        const float* row = chain.step(step);
        learned |= row[low] != 0 || row[spread] != 0;
        if (row[noise_weight] != 0 && shape[0] != chain.steps() + 1) throw Failure(where + ": has no noise of steps.");
        for (size_t age = 1; age <= most_lag; ++age)
            if (row[state_weights + age] != 0 || row[output_weights + age] != 0) chain.lag = std::max(chain.lag, age);
    }
    if (learned && bundle.predicted_channels != 2 * bundle.channels())
        throw Failure(where + ": for a learned variance, which the engine does not predict.");
    return chain;
}

// A compiled graph. `run` takes inputs by name, and returns the output in the engine's own buffer.
class Network {
  public:
    Network(ov::Core& core, const fs::path& file, const Bundle& bundle, std::optional<size_t> threads) {
        // Those of docs/engine-bundle.md: OpenVINO's defaults compute something else.
        ov::AnyMap settings{
            ov::hint::inference_precision(bundle.float_type == "bf16" ? ov::element::bf16 : ov::element::f32),
            ov::hint::dynamic_quantization_group_size(0),
            ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
            ov::hint::enable_cpu_pinning(false),
            ov::num_streams(1),
        };
        if (threads) settings.insert(ov::inference_num_threads(static_cast<int>(*threads)));
        model_ = core.compile_model(core.read_model(file.string()), "CPU", settings);
        request_ = model_.create_infer_request();
    }

    // The type of an input, by the name of its parameter.
    ov::element::Type type(const std::string& name) const { return port(name).get_element_type(); }

    ov::Tensor run(const std::map<std::string, ov::Tensor>& inputs) {
        for (const auto& input : model_.inputs()) {
            const auto found = inputs.find(input.get_node()->get_friendly_name());
            if (found == inputs.end())
                throw Failure("the engine takes '" + input.get_node()->get_friendly_name() + "'.");
            request_.set_tensor(input, found->second);
        }
        request_.infer();
        return request_.get_output_tensor(0);
    }

  private:
    ov::Output<const ov::Node> port(const std::string& name) const {
        for (const auto& input : model_.inputs())
            if (input.get_node()->get_friendly_name() == name) return input;
        throw Failure("the engine's graph has no input '" + name + "'. Build the engine again.");
    }

    ov::CompiledModel model_;
    ov::InferRequest request_;
};

ov::Shape with_rows(size_t rows, const std::vector<size_t>& shape) {
    ov::Shape whole{rows};
    whole.insert(whole.end(), shape.begin(), shape.end());
    return whole;
}

// The ends of the chains of images first..first + count - 1, (count, ...): Chains.inputs and Chains.advance in turn.
Floats run_chains(Network& network, const Bundle& bundle, const Chain& chain, const std::vector<size_t>& classes,
                  float scale, size_t first, size_t count) {
    const size_t elements = bundle.elements(), area = bundle.area(), all = count * elements;
    const size_t rows = count * bundle.rows_per_image();
    const size_t row_size = bundle.predicted_channels * area;  // of a prediction
    const auto noise_of = [&](size_t draw) { return &chain.noise[(draw * chain.images + first) * elements]; };

    Floats x(noise_of(0), noise_of(0) + all), prediction(all), states(rows * elements);
    for (float& value : x) value *= chain.initial_scale;
    // States and predictions of the steps before, the latest first; their weights are zero until there are any.
    std::vector<Floats> past_states(chain.lag, Floats(all)), past_predictions = past_states;

    // Conditional rows first, then unconditional ones.
    std::vector<int64_t> labels(rows, static_cast<int64_t>(bundle.null_class.value_or(0)));
    for (size_t i = 0; i < count; ++i) labels[i] = static_cast<int64_t>(classes[(first + i) % classes.size()]);
    ov::Tensor time(network.type(bundle.time), {rows});
    const std::map<std::string, ov::Tensor> inputs{
        {bundle.state, {ov::element::f32, with_rows(rows, bundle.shape), states.data()}},
        {bundle.time, time},
        {bundle.label, {ov::element::i64, {rows}, labels.data()}},
    };

    for (size_t step = chain.steps(); step-- > 0;) {
        const float* row = chain.step(step);
        for (size_t i = 0; i < states.size(); ++i) states[i] = x[i % all] * row[input_scale];
        if (time.get_element_type() == ov::element::i64)
            std::fill_n(time.data<int64_t>(), rows, static_cast<int64_t>(chain.timesteps[step]));
        else
            std::fill_n(time.data<float>(), rows, static_cast<float>(chain.timesteps[step]));

        const ov::Tensor output = network.run(inputs);
        if (output.get_element_type() != ov::element::f32 || output.get_size() != rows * row_size)
            throw Failure("the engine returned another shape than its card says. Build the engine again.");
        const float* conditional = output.data<const float>();
        const float* unconditional = conditional + count * row_size;
        const size_t guided = bundle.guided_channels * area;

        // The prediction of each image: u + scale (c - u) in the channels that guidance moves.
        for (size_t image = 0; image < count; ++image)
            for (size_t i = 0; i < elements; ++i) {
                const size_t at = image * row_size + i;
                float value = conditional[at];
                if (i < guided) {
                    value -= unconditional[at];
                    value *= scale;
                    value += unconditional[at];
                }
                prediction[image * elements + i] = value;
            }

        const bool noisy = row[noise_weight] != 0, learned = row[low] != 0 || row[spread] != 0;
        const float* noise = noisy ? noise_of(step + 1) : nullptr;
        for (size_t i = 0; i < all; ++i) {
            const float state = x[i];
            x[i] *= row[state_weights];
            x[i] += prediction[i] * row[output_weights];
            for (size_t age = 1; age <= chain.lag; ++age) {
                x[i] += past_states[age - 1][i] * row[state_weights + age];
                x[i] += past_predictions[age - 1][i] * row[output_weights + age];
            }
            if (noisy) {
                float drawn = noise[i];
                if (learned) {  // the channels after the state's, of the conditional row
                    float factor = conditional[i / elements * row_size + elements + i % elements] + 1;
                    factor *= 0.25f * row[spread];
                    factor += 0.5f * row[low];
                    drawn *= static_cast<float>(std::exp(static_cast<double>(factor)));
                }
                x[i] += drawn * row[noise_weight];
            }
            if (!std::isfinite(x[i]))
                throw Failure("image " + std::to_string(first + i / elements) + " became NaN or infinite at step " +
                              std::to_string(step) + ". Lower the guidance scale.");
            if (chain.lag > 0) past_states.back()[i] = state, past_predictions.back()[i] = prediction[i];
        }
        for (auto* past : {&past_states, &past_predictions})
            if (chain.lag > 0) std::rotate(past->begin(), past->end() - 1, past->end());
    }
    return x;
}

// Images (N, C, H, W) in -1..1 as bytes (N, H, W, 3): clamp(127.5 x + 128), truncated.
std::string to_pixels(const float* values, const ov::Shape& shape) {
    if (shape.size() != 4 || (shape[1] != 1 && shape[1] != 3)) throw Failure("the engine makes no pictures.");
    const size_t area = shape[2] * shape[3];
    std::string pixels;
    for (size_t image = 0; image < shape[0]; ++image)
        for (size_t i = 0; i < area; ++i)
            for (size_t channel = 0; channel < 3; ++channel) {
                const float value = values[(image * shape[1] + channel % shape[1]) * area + i] * 127.5f + 128;
                pixels += static_cast<char>(static_cast<unsigned char>(std::min(std::max(value, 0.0f), 255.0f)));
            }
    return pixels;
}

void write_file(const fs::path& path, const std::string& content) {
    const fs::path temporary = path.string() + ".partial";
    std::ofstream file(temporary, std::ios::binary);
    file.write(content.data(), static_cast<std::streamsize>(content.size()));
    file.close();
    std::error_code error;
    if (file) fs::rename(temporary, path, error);
    if (!file || error) {
        fs::remove(temporary, error);
        throw Failure(path.string() + ": cannot be written.");
    }
}

void run(const Options& options) {
    const Bundle bundle = open_bundle(options.engine);
    const Chain chain = read_chain(options.noise, bundle);
    std::vector<size_t> classes = options.classes;
    if (classes.empty())  // all in turn, without the one of unconditional rows
        for (size_t i = 0; i + (bundle.null_class ? 1 : 0) < bundle.classes; ++i) classes.push_back(i);
    for (size_t each : classes)
        if (each >= bundle.classes)
            throw Failure("class " + std::to_string(each) + "; expected 0.." + std::to_string(bundle.classes - 1) +
                          ".");
    if (options.guidance_scale && !bundle.guided) throw Failure("this model takes no guidance scale. Leave it out.");
    const float scale = options.guidance_scale.value_or(bundle.guidance_scale);

    ov::Core core;
    Network network(core, bundle.entry, bundle, options.threads);
    Floats states;
    for (size_t first = 0; first < chain.images; first += options.batch) {
        const size_t count = std::min(options.batch, chain.images - first);
        const Floats made = run_chains(network, bundle, chain, classes, scale, first, count);
        states.insert(states.end(), made.begin(), made.end());
    }
    if (!options.states.empty())
        write_file(options.states, {reinterpret_cast<const char*>(states.data()), states.size() * sizeof(float)});

    std::string pixels;
    ov::Shape shape = with_rows(chain.images, bundle.shape);
    if (bundle.decoder.empty()) {
        pixels = to_pixels(states.data(), shape);
    } else {
        Network decoder(core, bundle.decoder, bundle, options.threads);
        for (size_t image = 0; image < chain.images; ++image) {
            float* latents = &states[image * bundle.elements()];
            const ov::Tensor decoded =
                decoder.run({{"latents", {ov::element::f32, with_rows(1, bundle.shape), latents}}});
            shape = decoded.get_shape();
            pixels += to_pixels(decoded.data<const float>(), shape);
        }
    }
    // All images below one another: after the header these are the bytes (N, H, W, 3).
    const std::string size = std::to_string(shape[3]) + " " + std::to_string(chain.images * shape[2]);
    write_file(options.output, "P6\n" + size + "\n255\n" + pixels);
    std::cout << options.output.string() << "\n";
}

int main(int count, char** words) {
    try {
        run(read_options(count, words));
        return 0;
    } catch (const std::exception& error) {  // OpenVINO's messages have many lines; the last one says what is wrong
        std::string text = error.what();
        text.erase(text.find_last_not_of(" \n") + 1);
        std::cerr << "tqdit_sample: " << text.substr(text.rfind('\n') + 1) << "\n";
        return 1;
    }
}
