package store

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/event"
)

// BenchmarkAppend measures appends by one and by many callers at once, each
// waiting for its answer. Read it against the first line: what the disk itself
// needs to write one page and make it last.
func BenchmarkAppend(b *testing.B) {
	b.Run("bare write and fdatasync", func(b *testing.B) {
		f, err := os.Create(filepath.Join(b.TempDir(), "bare"))
		if err != nil {
			b.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		page, at := make([]byte, 4096), int64(0)
		if _, err := f.Write(make([]byte, 1000*len(page))); err != nil { // as SQLite's log, written over and over
			b.Fatal(err)
		}
		for b.Loop() {
			at = (at + 1) % 1000
			if _, err := f.WriteAt(page, at*int64(len(page))); err != nil {
				b.Fatal(err)
			}
			if err := syscall.Fdatasync(int(f.Fd())); err != nil {
				b.Fatal(err)
			}
		}
	})
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprint(callers, " callers"), func(b *testing.B) { benchmarkAppend(b, callers) })
	}
}

func benchmarkAppend(b *testing.B, callers int) {
	db, _ := open(b)
	commits := countCommits(b, db)
	var all sync.WaitGroup
	var left atomic.Int64
	left.Store(int64(b.N))
	b.ResetTimer()
	for i := range callers {
		s := event.Stream(fmt.Sprint("lock/", i))
		all.Go(func() {
			for v := int64(0); left.Add(-1) >= 0; v++ {
				if _, err := db.Append(context.Background(), typical(s, v)); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "appends/s")
	b.ReportMetric(float64(b.N)/float64(commits.Load()), "appends/commit")
}

// typical is an event of the size that most have.
func typical(s event.Stream, expect int64) event.Append {
	return event.Append{Stream: s, Expect: expect, Org: "acme", Time: time.UnixMilli(1_780_000_000_000), Events: []event.New{{
		Type: "LockOpenRequested", Schema: 1,
		Data: []byte(`{"lockId":123,"uuid":"0197d3a0-0000-7000-8000-000000000000","timestamp":"2026-05-29T12:00:00.000Z"}`),
		Meta: event.Meta{Actor: "user:0197d3a0-0000-7000-8000-000000000001", Org: "acme", Credential: "key:abcdefgh", Right: "owner", Remote: "192.0.2.1", Agent: "bench/1"},
	}}}
}
