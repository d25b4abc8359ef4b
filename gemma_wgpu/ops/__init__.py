"""Operations that a model is written in: weight matrices, the cache, and a thin function for each shader."""
