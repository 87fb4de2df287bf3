"""What GPU backends share; nothing here names one of them."""
