"""Programs of the kinds that users of other libraries write, as small as can be."""
