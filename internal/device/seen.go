package device

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// The device remembers at least the last seenCount commands and those of the
// last seenFor. Whatever it forgets has long expired.
const (
	seenCount = 256
	seenFor   = time.Hour
)

// A record is what the device remembers about one command.
type record struct {
	Command   Command `json:"open"`
	Result    Kind    `json:"result,omitempty"` // Opened, Refused or Failed; empty: the bolt was about to move
	Reason    Reason  `json:"reason,omitempty"`
	At        int64   `json:"at"`                  // epoch milliseconds, by the device's wall clock
	Delivered bool    `json:"delivered,omitempty"` // the shadow has accepted the report of the result
}

// A journal is the device's memory of commands: a file with one record a line,
// of which the last line of an id counts. It belongs to one goroutine.
type journal struct {
	path    string
	records map[string]record
	order   []string // ids, oldest first
	lines   int      // in the file
	full    int      // lines at which it is written anew
}

// openJournal reads the file at path, or begins it. A last line that was torn
// by a loss of power is dropped: it never became durable, so nothing was done
// because of it. Any other damage is an error, since a lock with holes in its
// memory could open twice.
func openJournal(path string) (*journal, error) {
	j := &journal{path: path, records: map[string]record{}}
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("device: read seen commands: %w", err)
	}
	lines := bytes.SplitAfter(data, []byte("\n"))
	for n, line := range lines[:len(lines)-1] { // the last one has no newline: empty, or torn
		var r record
		if err := json.Unmarshal(line, &r); err != nil {
			return nil, fmt.Errorf("device: seen commands damaged: %s:%d: %w", path, n+1, err)
		}
		j.remember(r)
	}
	// Written anew, so that no record is ever appended to a torn line.
	return j, j.compact(time.Now())
}

// find returns the record of the command with this id.
func (j *journal) find(id string) (record, bool) {
	r, ok := j.records[id]
	return r, ok
}

// put remembers r in place of an earlier record of the same command. When it
// returns nil, r is on the disk. After an error the device must not go on: its
// memory and the disk may differ.
func (j *journal) put(r record) error {
	if j.lines >= j.full {
		if err := j.compact(time.Now()); err != nil {
			return err
		}
	}
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := writeSync(j.path, os.O_APPEND, append(line, '\n')); err != nil {
		return fmt.Errorf("device: remember command: %w", err)
	}
	j.lines++
	j.remember(r)
	return nil
}

func (j *journal) remember(r record) {
	if _, known := j.records[r.Command.ID]; !known {
		j.order = append(j.order, r.Command.ID)
	}
	j.records[r.Command.ID] = r
}

// undelivered lists the commands whose result the shadow has not accepted,
// oldest first.
func (j *journal) undelivered() []record {
	var open []record
	for _, id := range j.order {
		if r := j.records[id]; !r.Delivered {
			open = append(open, r)
		}
	}
	return open
}

// compact replaces the file by one with a line for each command that is still
// worth remembering at now.
func (j *journal) compact(now time.Time) error {
	var kept []string
	var file bytes.Buffer
	lines := json.NewEncoder(&file)
	for i, id := range j.order {
		r := j.records[id]
		last := i >= len(j.order)-seenCount
		if !last && now.Sub(time.UnixMilli(r.At)) > seenFor {
			delete(j.records, id)
			continue
		}
		kept = append(kept, id)
		if err := lines.Encode(r); err != nil {
			return err
		}
	}
	j.order, j.lines = kept, len(kept)
	j.full = max(4*seenCount, 2*j.lines) // so that what is kept is not written anew each time
	return replace(j.path, file.Bytes())
}

// replace puts a file with this content at path, durably, so that a loss of
// power leaves either the old file or the new one.
func replace(path string, content []byte) error {
	temp := path + ".new"
	if err := writeSync(temp, os.O_CREATE|os.O_TRUNC, content); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func writeSync(path string, flag int, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|flag, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}
