package device

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func seenRecord(id string, at time.Time, result Kind) record {
	return record{Command: Command{id, t0, t0.Add(sec(10))}, Result: result, At: at.UnixMilli()}
}

func mustOpen(t *testing.T, path string) *journal {
	t.Helper()
	j, err := openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func mustPut(t *testing.T, j *journal, r record) {
	t.Helper()
	if err := j.put(r); err != nil {
		t.Fatal(err)
	}
}

// Wherever the power goes while the last line is written: each record that was
// durable before is there, the torn one is there as a whole or not at all, and
// the next record does not grow together with it.
func TestSeenSurvivesATornLastLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seen")
	j := mustOpen(t, path)
	now := time.Now()
	mustPut(t, j, seenRecord("a", now, Opened))
	durable, _ := os.ReadFile(path)
	mustPut(t, j, seenRecord("b", now, ""))
	whole, _ := os.ReadFile(path)

	for cut := len(durable); cut <= len(whole); cut++ {
		if err := os.WriteFile(path, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		mustPut(t, mustOpen(t, path), seenRecord("c", now, Refused))
		again := mustOpen(t, path)
		_, b := again.find("b")
		if b != (cut == len(whole)) {
			t.Fatalf("cut at %d of %d: b is there: %v", cut, len(whole), b)
		}
		for _, id := range []string{"a", "c"} {
			if _, ok := again.find(id); !ok {
				t.Fatalf("cut at %d: %s is forgotten", cut, id)
			}
		}
	}
}

func TestSeenRefusesADamagedMemory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seen")
	j := mustOpen(t, path)
	mustPut(t, j, seenRecord("a", time.Now(), Opened))
	mustPut(t, j, seenRecord("b", time.Now(), Opened))
	data, _ := os.ReadFile(path)
	if err := os.WriteFile(path, bytes.Replace(data, []byte(`{"open":["a"`), []byte(`{"open":[`), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openJournal(path); err == nil {
		t.Fatal("a lock with a hole in its memory started")
	}
}

// A crash while the file is replaced leaves the old file or the new one.
func TestSeenIgnoresAnUnfinishedReplacement(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seen")
	mustPut(t, mustOpen(t, path), seenRecord("a", time.Now(), Opened))
	if err := os.WriteFile(path+".new", []byte(`{"op`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, ok := mustOpen(t, path).find("a"); !ok {
		t.Fatal("a is forgotten")
	}
}

func TestSeenIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seen")
	old, now := time.Now().Add(-2*seenFor), time.Now()
	j := mustOpen(t, path)
	for i := range 5 * seenCount {
		mustPut(t, j, seenRecord(fmt.Sprint("old", i), old, Opened))
	}
	if j.lines > 4*seenCount || len(j.records) != len(j.order) {
		t.Fatalf("%d lines, %d records in %d places", j.lines, len(j.records), len(j.order))
	}
	mustPut(t, j, seenRecord("recent", now, Opened))
	for i := range seenCount {
		mustPut(t, j, seenRecord(fmt.Sprint("last", i), old, Opened))
	}
	j = mustOpen(t, path)
	if len(j.records) != seenCount+1 {
		t.Fatalf("%d records", len(j.records))
	}
	for _, id := range []string{"recent", "last0", fmt.Sprint("last", seenCount-1)} {
		if _, ok := j.find(id); !ok {
			t.Errorf("%s is forgotten", id)
		}
	}
}
