"""BNN Init: the signs and scales training starts from. `pretrained` fits a trained model, `random` keeps variance."""
