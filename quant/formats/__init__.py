"""How a weight's parts lie in safetensors: one module a layout (types.Layout), modelopt's, bitsandbytes',
compressed-tensors' and dgq's own. Each maps one weight to named tensors and back. No reading or writing of files.
"""
