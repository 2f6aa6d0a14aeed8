"""Targets, drafters and their stores: what they are (protocols), what families differ in, files, and two runners.

protocols.py, distributions.py: what an algorithm may ask of a model, whoever runs it.
torch/, native/: two runners of models, on torch and on the CPU's integer kernels.
families/, geometry.py, rotary.py: facts of models, read by both.
gguf.py, checkpoint.py, tokenizer.py, loading.py: files.  cache.py: token slots.
"""
