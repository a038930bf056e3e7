package eventtest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/event"
)

// wakeMost is how long n waits may take in all. It is far more than waking
// needs and far less than finding out by asking once in a while.
func wakeMost(n int) time.Duration { return time.Duration(n) * 200 * time.Millisecond }

func testWaitAtOnce(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	last := mustAppend(ctx, t, log, numbered("lock/1", 0, 3))[2].Position
	begin := time.Now()
	const n = 10
	for i := range n {
		if err := log.Wait(ctx, event.Position(i)%last); err != nil {
			t.Fatalf("wait for what is there: %v", err)
		}
	}
	if took := time.Since(begin); took > wakeMost(n) {
		t.Errorf("%d waits for what is there took %s", n, took)
	}
}

// testWaitWakes appends and waits in turns, so that each wait begins before or
// after its append as chance will have it.
func testWaitWakes(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	const rounds, waiters = 100, 4
	begin := time.Now()
	p := event.Position(0)
	for v := range int64(rounds) {
		woken := make(chan error, waiters)
		for range waiters {
			go func() { woken <- log.Wait(ctx, p) }()
		}
		next := mustAppend(ctx, t, log, numbered("lock/1", v, 1))[0].Position
		for range waiters {
			if err := <-woken; err != nil {
				t.Fatalf("round %d: %v", v, err)
			}
		}
		p = next
	}
	if took := time.Since(begin); took > wakeMost(rounds) {
		t.Errorf("%d rounds took %s: waiters were not woken by the appends", rounds, took)
	}
}

// testWaitElsewhere: what another process appends is noticed too, if later.
func testWaitElsewhere(t *testing.T, engine Engine) {
	ctx, open := testContext(t), engine(t)
	here, shutHere := open()
	defer shutHere()
	there, shutThere := open()
	defer shutThere()
	woken := make(chan error, 1)
	go func() { woken <- here.Wait(ctx, 0) }()
	records := mustAppend(ctx, t, there, numbered("lock/1", 0, 1))
	if err := <-woken; err != nil {
		t.Fatal(err)
	}
	mustBeSame(t, "appended elsewhere", mustAfter(ctx, t, here, 0, everything), records)
}

func testWaitEnds(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	last := mustAppend(ctx, t, log, numbered("lock/1", 0, 1))[0].Position

	over, cancel := context.WithCancel(ctx)
	cancel()
	if err := log.Wait(over, last); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled before: %v", err)
	}
	for i := range 50 { // at any moment of the wait
		over, cancel := context.WithCancel(ctx)
		ended := make(chan error, 1)
		go func() { ended <- log.Wait(over, last) }()
		go cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Fatalf("cancelled meanwhile, round %d: %v", i, err)
		}
	}
	over, cancel = context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	if err := log.Wait(over, last); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
}

// testReadEnds: a read that is given up ends with the context's error or with
// what it was asked for, and harms no read after it.
func testReadEnds(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	all := mustAppend(ctx, t, log, numbered("lock/1", 0, 200))
	for i, read := range []func(context.Context) ([]event.Record, error){
		func(ctx context.Context) ([]event.Record, error) { return log.Stream(ctx, "lock/1", 1, everything) },
		func(ctx context.Context) ([]event.Record, error) { return log.After(ctx, 0, everything) },
	} {
		for range 50 {
			over, cancel := context.WithCancel(ctx)
			go cancel()
			records, err := read(over)
			switch {
			case err == nil:
				mustBeSame(t, "finished all the same", records, all)
			case !errors.Is(err, context.Canceled):
				t.Fatalf("read %d: %v", i, err)
			}
			records, err = read(ctx)
			if err != nil {
				t.Fatalf("the read after one that was given up: %v", err)
			}
			mustBeSame(t, fmt.Sprint("the read after one that was given up, ", i), records, all)
		}
	}
}
