package main

import "testing"

func TestReplayTranscript(t *testing.T)  { transcript(t, "testdata/replay.txtar") }
func TestSuggestTranscript(t *testing.T) { transcript(t, "testdata/suggest.txtar") }
func TestTestTranscript(t *testing.T)    { transcript(t, "testdata/test.txtar") }
