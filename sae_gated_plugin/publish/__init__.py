"""Publishing on the Hugging Face Hub: conversion, card, cleaning, one commit."""
