"""One builder per stage: from a typed configuration to the objects that Lightning trains."""
