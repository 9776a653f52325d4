"""transformers opens dgq's safetensors artifacts after `import dgq.runtime.hf`, and that line alone: importing this
room registers quantizer.py's quantizers. modules.py holds what stands in the model for packed weights.
"""

from dgq.runtime.hf import quantizer as quantizer
