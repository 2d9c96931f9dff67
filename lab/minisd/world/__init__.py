"""The embedded world: vocabulary, drawings, styles, captions."""
