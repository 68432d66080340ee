"""What report_page.py is made of."""
