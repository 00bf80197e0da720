"""The terms of a pretraining loss; `patchrank.pretrain.objectives` has the table and the weighted sum."""
