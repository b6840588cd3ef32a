"""Image sets: decoding, readers of folders and lists, the rendered set, the cache of decoded images."""
