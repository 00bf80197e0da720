"""What decides which patches a tower in training sees; the table is `patchrank.pretrain.maskers`."""
