r"""To and from the folder that diffusers' `StableDiffusionPipeline` opens; needs neither diffusers nor transformers."""
