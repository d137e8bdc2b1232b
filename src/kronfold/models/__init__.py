"""What kronfold knows of Hugging Face models: families, sites, surgery, loading, cost. No other room does."""
