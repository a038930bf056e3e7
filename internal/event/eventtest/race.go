package eventtest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/openlock/openlock/internal/event"
)

// testOneWinner races for each version of a stream from two processes.
func testOneWinner(t *testing.T, engine Engine) {
	ctx, open := testContext(t), engine(t)
	here, shutHere := open()
	defer shutHere()
	there, shutThere := open()
	defer shutThere()
	const rounds, racers = 20, 8
	for v := range int64(rounds) {
		errs := inParallel(racers, func(i int) error {
			_, err := []event.Log{here, there}[i%2].Append(ctx, numbered("lock/1", v, 1))
			return err
		})
		if won := count(t, errs); won != 1 {
			t.Fatalf("%d appends won version %d", won, v+1)
		}
	}
	mustBeSame(t, "stream", mustStream(ctx, t, here, "lock/1", 1, everything), mustStream(ctx, t, there, "lock/1", 1, everything))
}

// count counts the successes among appends that may conflict.
func count(t *testing.T, errs []error) (won int) {
	t.Helper()
	for _, err := range errs {
		switch {
		case err == nil:
			won++
		case !errors.Is(err, event.ErrConflict):
			t.Fatalf("lost with %v, want ErrConflict", err)
		}
	}
	return won
}

// testWholeWinner races with several events each: the winner's are recorded,
// all of them and next to each other, and nobody else's.
func testWholeWinner(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	const rounds, racers = 20, 6
	version, p := int64(0), event.Position(0)
	for range rounds {
		winners := make(chan []event.Record, racers)
		errs := inParallel(racers, func(i int) error {
			records, err := log.Append(ctx, numbered("lock/1", version, i+2))
			if err == nil {
				winners <- records
			}
			return err
		})
		if won := count(t, errs); won != 1 {
			t.Fatalf("%d appends won at version %d", won, version)
		}
		records := <-winners
		mustBeSame(t, "recorded", mustAfter(ctx, t, log, p, everything), records)
		version += int64(len(records))
		p = records[len(records)-1].Position
	}
}

// testNeighbours: appends that are made at the same time do not share a fate.
func testNeighbours(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	const n = 64
	errs := inParallel(n, func(i int) error {
		_, err := log.Append(ctx, numbered(event.Stream(fmt.Sprint("lock/", i)), int64(i%2), 2))
		return err
	})
	for i, err := range errs {
		s := event.Stream(fmt.Sprint("lock/", i))
		stored := len(mustStream(ctx, t, log, s, 1, everything))
		if good := i%2 == 0; good && (err != nil || stored != 2) || !good && (!errors.Is(err, event.ErrConflict) || stored != 0) {
			t.Errorf("%s: %d recorded, answer %v", s, stored, err)
		}
	}
}

// testCancelled: who gives up is told the truth about what was recorded. Many
// give up at once, so that some do while their append is under way.
func testCancelled(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	errs := inParallel(16, func(i int) error {
		return giveUp(ctx, log, event.Stream(fmt.Sprint("lock/", i)))
	})
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	mustCount(t, mustAfter(ctx, t, log, 0, everything))
}

func giveUp(ctx context.Context, log event.Log, s event.Stream) error {
	version := int64(0)
	for i := range 40 {
		over, cancel := context.WithCancel(ctx)
		if i%2 == 0 {
			cancel()
		} else {
			go cancel()
		}
		records, err := log.Append(over, numbered(s, version, 2))
		cancel()
		if err != nil && !errors.Is(err, context.Canceled) {
			return fmt.Errorf("%s at %d, given up: %w", s, version, err)
		}
		version += int64(len(records))
		if _, err := log.Append(ctx, numbered(s, version, 1)); err != nil {
			return fmt.Errorf("%s is not at %d, as the answer said: %w", s, version, err)
		}
		version++
	}
	return nil
}

// testFollow has readers behind the log while processes append to it: each
// reader sees every record once and in order, whatever the time it comes.
func testFollow(t *testing.T, engine Engine) {
	ctx, open := testContext(t), engine(t)
	here, shutHere := open()
	defer shutHere()
	there, shutThere := open()
	defer shutThere()
	logs := []event.Log{here, there}

	const appenders, appends, readers = 8, 25, 4
	total := 0
	for i := range appends {
		total += appenders * (i%3 + 1)
	}
	seen := make([][]event.Record, readers)
	errs := inParallel(appenders+readers, func(i int) (err error) {
		if i < readers {
			seen[i], err = follow(ctx, logs[i%2], total, i+1)
			return err
		}
		return appendMany(ctx, logs[i%2], event.Stream(fmt.Sprint("lock/", i)), appends)
	})
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	all := mustAfter(ctx, t, here, 0, everything)
	for i := range seen {
		mustBeSame(t, fmt.Sprintf("reader %d", i), seen[i], all)
	}
	mustCount(t, all)
}

func appendMany(ctx context.Context, log event.Log, s event.Stream, appends int) error {
	version := int64(0)
	for i := range appends {
		records, err := log.Append(ctx, numbered(s, version, i%3+1))
		if err != nil {
			return fmt.Errorf("%s at %d: %w", s, version, err)
		}
		version += int64(len(records))
	}
	return nil
}

// follow reads the log in pages as it grows, until there are total records.
func follow(ctx context.Context, log event.Log, total, page int) (seen []event.Record, err error) {
	p := event.Position(0)
	for len(seen) < total {
		if err := log.Wait(ctx, p); err != nil {
			return seen, fmt.Errorf("saw %d of %d records, the rest never came behind position %d: %w", len(seen), total, p, err)
		}
		records, err := log.After(ctx, p, page)
		if err != nil {
			return seen, err
		}
		for _, r := range records {
			if r.Position <= p {
				return seen, fmt.Errorf("read position %d behind %d", r.Position, p)
			}
			p = r.Position
		}
		seen = append(seen, records...)
	}
	return seen, nil
}

// mustCount holds every stream of a whole log to versions 1, 2, 3 … in order of
// position.
func mustCount(t tb, all []event.Record) {
	t.Helper()
	last := map[event.Stream]int64{}
	for _, r := range all {
		if r.Version != last[r.Stream]+1 {
			t.Fatalf("%s has version %d behind %d", r.Stream, r.Version, last[r.Stream])
		}
		last[r.Stream] = r.Version
	}
}

// call is one append as its caller saw it. begin and end count all beginnings
// and ends, so that they tell which calls were over before others began.
type call struct {
	append     event.Append
	before     int64 // version that the caller had read of the stream
	begin, end int64
	records    []event.Record
	err        error
}

// judge says what is wrong with a set of concurrent calls and the log they
// left, nil when some order of the calls explains it.
func judge(calls []call, all []event.Record) error {
	versions := map[event.Stream]int64{}
	for _, r := range all {
		versions[r.Stream] = r.Version
	}
	var won []call
	for _, c := range calls {
		s, expect := c.append.Stream, c.append.Expect
		switch {
		case c.err == nil:
			won = append(won, c)
		case !errors.Is(c.err, event.ErrConflict):
			return fmt.Errorf("%s at %d: %w", s, expect, c.err)
		case c.before == expect && versions[s] == expect:
			return fmt.Errorf("%s was at %d all the time, yet an append was told of a conflict", s, expect)
		}
	}
	return errors.Join(tile(won, all), inTime(won))
}

// tile holds that the log is made of exactly what the successful calls were told.
func tile(won []call, all []event.Record) error {
	slices.SortFunc(won, func(a, b call) int { return cmp.Compare(a.records[0].Position, b.records[0].Position) })
	var told []event.Record
	for _, c := range won {
		if d := differ(c.records, wanted(c.append, c.records)); d != "" {
			return fmt.Errorf("answer: %s", d)
		}
		told = append(told, c.records...)
	}
	if d := differ(all, told); d != "" {
		return fmt.Errorf("log against answers: %s", d)
	}
	return nil
}

// inTime holds that positions are in the order of time where calls did not
// overlap. won is in order of position.
func inTime(won []call) error {
	latest := int64(0) // beginning among the calls with lower positions
	for _, c := range won {
		if c.end < latest {
			return fmt.Errorf("%s at %d was over before a call began that has a lower position", c.append.Stream, c.append.Expect)
		}
		latest = max(latest, c.begin)
	}
	return nil
}
