"""From flags, YAML, ds_config and preset to one frozen RunConfig."""
