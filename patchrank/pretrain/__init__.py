"""Contrastive pretraining: pictures and captions in, a CLIP of our own out (`python -m patchrank.pretrain`)."""
