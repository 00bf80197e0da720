// The best classes of one picture, with ONNX Runtime: classify MODEL.onnx PICTURE.ppm
//
// MODEL.onnx is a graph of `python -m export.onnx_file` with a class list inside; PICTURE.ppm a binary PPM (P6) of the
// model's size, as `magick photo.jpg -resize 224x224^ -gravity center -extent 224x224 picture.ppm` writes it.
// Build: g++ -std=c++17 classify.cpp -I ONNXRUNTIME/include -L ONNXRUNTIME/lib -l onnxruntime -o classify
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {
    int64_t height = 0, width = 0;
    std::vector<uint8_t> rgb;
};

static Picture read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    int64_t largest = 0;
    Picture picture;
    file >> magic >> picture.width >> picture.height >> largest;
    if (magic != "P6" || largest != 255) throw std::runtime_error(path + ": must be a binary PPM (P6) of 8 bits");
    file.get();
    picture.rgb.resize(picture.height * picture.width * 3);
    file.read(reinterpret_cast<char*>(picture.rgb.data()), picture.rgb.size());
    if (!file) throw std::runtime_error(path + ": ends too early");
    return picture;
}

int main(int argc, char** argv) try {
    if (argc != 3) throw std::runtime_error("usage: classify MODEL.onnx PICTURE.ppm");
    Picture picture = read_ppm(argv[2]);

    Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "classify");
    Ort::SessionOptions options;
    Ort::Session session(env, argv[1], options);

    const std::vector<int64_t> shape{1, picture.height, picture.width, 3};
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto image = Ort::Value::CreateTensor<uint8_t>(
        memory, picture.rgb.data(), picture.rgb.size(), shape.data(), shape.size());

    const char* inputs[] = {"image"};
    const char* outputs[] = {"top5_index", "top5_probability"};
    const auto found = session.Run(Ort::RunOptions{nullptr}, inputs, &image, 1, outputs, 2);
    const auto* index = found[0].GetTensorData<int64_t>();
    const auto* probability = found[1].GetTensorData<float>();
    const size_t count = found[0].GetTensorTypeAndShapeInfo().GetElementCount();
    for (size_t i = 0; i < count; ++i) std::cout << index[i] << ' ' << probability[i] << '\n';
} catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
}
