"""Export an encoder to float ONNX and to dynamic int8 with optimum-onnx: ``optimum_int8.py CHECKPOINT OUT CONFIG...``.

Run by benchmark_encoder.py inside optimum's own environment, with an older transformers than this project's. Writes
``OUT/float/model.onnx`` and, for every name of an ``AutoQuantizationConfig``, ``OUT/CONFIG/model_quantized.onnx``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from optimum.onnxruntime import AutoQuantizationConfig, ORTModelForFeatureExtraction, ORTQuantizer


def main() -> None:
    source, out, *configs = sys.argv[1:]
    model = ORTModelForFeatureExtraction.from_pretrained(source, export=True)
    model.save_pretrained(Path(out) / "float")
    for name in configs:
        quantizer = ORTQuantizer.from_pretrained(Path(out) / "float")
        config = getattr(AutoQuantizationConfig, name)(is_static=False, per_channel=True)
        quantizer.quantize(save_dir=Path(out) / name, quantization_config=config)


if __name__ == "__main__":
    main()
